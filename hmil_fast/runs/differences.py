"""Compare a run's settings or store with those given now, and describe what differs."""

from collections.abc import Mapping
from typing import Any

from hmil_fast.io.store import FeatureStore

Difference = tuple[str, Any, Any]


def store_identity(store: FeatureStore) -> dict[str, Any]:
    """Return what defines the vectors of a store's plain tiles: dim, encoder and tiling.

    Not whether a GPU decoded them: its pixels differ by less than what precisions do to features.
    """
    spec, left_out = store.spec, ("views", "gpu_decoded")
    tiling = {name: value for name, value in spec.tiling.items() if name not in left_out}
    return {"dim": spec.dim, "encoder": dict(spec.encoder), "tiling": tiling}


def differences(
    new: Mapping[str, Any], old: Mapping[str, Any], prefix: str = ""
) -> list[Difference]:
    """List the values in which two nested mappings differ: name, new value, old value."""
    listed: list[Difference] = []
    for name in {**new, **old}:
        a, b = new.get(name), old.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            listed += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            listed.append((f"{prefix}{name}", a, b))
    return listed


def store_differences(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[Difference]:
    """List the differences of two store identities; for two imports, only in what both state."""
    listed = differences(new, old)
    if not all("imported_from" in each["encoder"] for each in (new, old)):
        return listed
    return [
        (name, a, b)
        for name, a, b in listed
        if not name.endswith(".imported_from") and None not in (a, b)
    ]


def describe(difference: Difference) -> str:
    """Describe a difference between a store or command, and a run."""
    name, new, old = difference
    if name != "tiling.around":
        return f"{name} is {new!r}, was {old!r}"
    # tiles of a coarse scale: also those with little tissue that hold a tile of the finer one
    how = [
        "laid by themselves" if mpp is None else f"laid around those at {mpp:g} µm per px"
        for mpp in (new, old)
    ]
    return f"its tiles are {how[0]}, the run's were {how[1]}"
