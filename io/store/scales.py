"""One scale of a store that holds several, read as if the store had no other."""

from hmil_fast.errors import UsageError
from hmil_fast.io.store.part import StorePart
from hmil_fast.io.store.reader import AttemptReader
from hmil_fast.io.store.store import FeatureStore

_SAME_MPP = 0.01


def at_scale(store: FeatureStore, mpp: float | None = None) -> FeatureStore:
    """A store's slides at one scale: their features, coordinates, facts and digests are of it.

    Nothing is copied: each scale lies in arrays of its own.

    Args:
        store: A store of one scale, which comes back as it is, or of several.
        mpp: µm per px asked for at extraction; the finest scale by default.

    Raises:
        UsageError: The store has no scale within 1 % of that.
    """
    scales = store.spec.scales
    scale = 0
    if mpp is not None:
        # imported features may not say their mpp
        near = [i for i, m in enumerate(scales) if m and abs(float(m) / mpp - 1) <= _SAME_MPP]
        if not near:
            there = " and ".join("unknown" if m is None else f"{m:g}" for m in scales)
            raise UsageError(
                f"the store {store.path} has no features at {mpp:g} µm per px, its scale is {there}"
                if len(scales) == 1
                else f"the store {store.path} has no features at {mpp:g} µm per px, its scales are "
                f"{there}",
                "choose one that is there, or extract into a new --store with this --mpp",
            )
        scale = near[0]
    return store if len(scales) == 1 else _Scale(store, scale)


class _Scale(StorePart):
    """A store of several scales, seen at one."""

    def __init__(self, whole: FeatureStore, scale: int) -> None:
        super().__init__(whole, whole.spec.at(scale))
        self._scale = scale

    def _part(self, whole: AttemptReader) -> AttemptReader:
        prefix = "" if not self._scale else whole.record.scales[self._scale - 1].prefix
        return AttemptReader(whole.folder, whole.record.at(self._scale), prefix)
