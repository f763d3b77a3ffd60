"""TrainConfig and Runtime, and how they are read from YAML files, flags and key=value."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any

from hmil_fast.errors import UsageError
from hmil_fast.recipe import MODELS, PRESETS, Recipe
from hmil_fast.settings import (
    Allowed,
    check_settings,
    one_of,
    setting,
    settings_of,
    whole,
)

__all__ = ["MODELS", "PRESETS", "Recipe", "Runtime", "TrainConfig", "load_config", "load_runtime"]

CACHES = ("auto", "device", "host", "map", "stream")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class TrainConfig:
    """Data and folds of a run, with the recipe that its model is trained by.

    Two runs with equal TrainConfig, label tree, slides, folds and features do the same work.

    Example:
        >>> from hmil_fast import Recipe, TrainConfig
        >>> TrainConfig(folds=3, recipe=Recipe(epochs=50)).recipe.epochs
        50

    Raises:
        UsageError: A value that is not allowed.
    """

    recipe: Recipe = field(default=Recipe())
    baseline: str = setting(
        "mean",
        one_of(*MODELS, "none"),
        "Model that is trained beside the run's on the same folds, or none.",
    )
    folds: int = setting(
        5, whole(2), "Folds of the patient-grouped cross-validation; ignored for given splits."
    )
    val_fraction: float = setting(
        0.2,
        Allowed("above 0, at most 0.5", lambda v: 0 < v <= 0.5, "give a share of at most 0.5"),
        "Share of the training patients kept for validation.",
    )
    seed: int = setting(
        0, whole(0, 2**31 - 1), "Seed of the folds, the initial weights and the order of bags."
    )
    mpp: float = setting(
        0.0,
        Allowed(
            "0 or more",
            lambda v: 0 <= v < float("inf"),
            "give µm per px, or 0 for the finest scale",
        ),
        "µm/px of the features, where the store has several scales; 0 is the finest.",
    )
    scales: str = setting(
        "one",
        Allowed(
            "one, all",
            lambda v: v in ("one", "all"),
            'give "one" for the scale of mpp, or "all" without mpp',
        ),
        "Scales of the features: one is that of mpp; all is the finest tiles, each with the "
        "features of the coarser tiles that it lies in.",
    )
    views: int = setting(
        0,
        whole(0, 64),
        "Augmented views of the store to train on: a slide is drawn in one of them or as it is. "
        "Validation and prediction take the plain tiles.",
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_settings(self)
        if self.scales == "all" and self.mpp:
            raise UsageError(
                f"the settings mpp={self.mpp:g} and scales=all contradict each other",
                "leave out mpp to train on all scales, or scales to train on that one",
            )

    def values(self) -> dict[str, Any]:
        """Return all settings by name, those of the recipe among them."""
        own = dataclasses.asdict(self)
        return {**own.pop("recipe"), **own}

    def fingerprint(self) -> str:
        """Return a hash of all settings."""
        from hashlib import sha256  # here and below: --help does without

        text = json.dumps(self.values(), sort_keys=True)
        return sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """Return all settings as YAML, which `load_config` reads."""
        import yaml  # here, so that --help needs nothing installed

        lines = [yaml.safe_dump({name: value}).rstrip() for name, value in self.values().items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Runtime:
    """Where and how a command computes. It is not part of a run's identity.

    Example:
        >>> from hmil_fast import Runtime
        >>> Runtime(device="cpu", cache="stream").precision
        'auto'

    Raises:
        UsageError: A value that is not allowed.
    """

    device: str = setting(
        "auto",
        Allowed("auto, cpu, cuda, cuda:i", bool, "give auto, cpu or cuda:0"),
        "Device: auto takes a GPU where there is one.",
    )
    cache: str = setting(
        "auto",
        one_of(*CACHES),
        "Place of the features while training: GPU memory, main memory, a mapped file, or the "
        "store itself; auto takes the first that has room.",
    )
    precision: str = setting(
        "auto",
        one_of(*PRECISIONS),
        "Precision of matrix products: auto is bf16 where the hardware multiplies it. Weights, "
        "sums and losses are fp32.",
    )
    threads: int = setting(
        0, whole(0, 4096), "Threads of matrix products on a CPU; 0 leaves the number to torch."
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_settings(self)


def load_config(
    file: Path | None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Read a TrainConfig from a YAML file; flags and key=value override it.

    A file may name any setting, and the preset whose values the others have. Settings of `Runtime`
    are checked and left out.

    Args:
        file: YAML of one `name: value` a line.
        overrides: Texts of the form key=value.
        flags: Values by name; None for a flag that is not given.

    Raises:
        UsageError: Unreadable file, unknown setting, a value that is not allowed, or a flag and a
            key=value that say different things of one setting.
    """
    values = _read(file, overrides, flags)
    preset = values.get("preset", "best")
    if preset not in PRESETS:
        raise UsageError(f"setting preset is {preset!r}", f"choose one of {', '.join(PRESETS)}")
    recipe = dataclasses.replace(PRESETS[preset], **_part(Recipe, values))
    return TrainConfig(recipe, **_part(TrainConfig, values))


def load_runtime(
    file: Path | None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> Runtime:
    """Read a Runtime from the same sources as `load_config`, with the same errors."""
    return Runtime(**_part(Runtime, _read(file, overrides, flags)))


def _part(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    return {s.name: values[s.name] for s in settings_of(kind) if s.name in values}


def _read(
    file: Path | None, overrides: Sequence[str], flags: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the given settings by name, each of the right type."""
    values: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = _yaml(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the settings {file}: {error}", "correct it") from None
        if not isinstance(loaded, dict | None):
            raise UsageError(f"{file} holds no settings", "write one `name: value` a line")
        values.update(loaded or {})
    given = {k: v for k, v in (flags or {}).items() if v is not None}
    values.update(given)
    for pair in overrides:
        name, sign, text = pair.partition("=")
        if not sign:
            raise UsageError(f"{pair!r} is not of the form key=value", "write for instance lr=1e-3")
        try:
            values[name] = _yaml(text)
        except ValueError:
            values[name] = text
        if name in given and _typed(name, given[name]) != _typed(name, values[name]):
            raise UsageError(
                f"--{name} {given[name]} and {short(pair)} are both given", "give only one of them"
            )
    typed = {name: _typed(name, value) for name, value in values.items()}
    return {name: value for name, value in typed.items() if value is not None}


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _typed(name: object, value: Any) -> Any:
    """Convert a value to the type of its setting; None where the preset's value is asked for."""
    types: dict[object, type] = {"preset": str}
    for kind in (Recipe, TrainConfig, Runtime):
        types |= {each.name: type(each.defaults[0]) for each in settings_of(kind)}
    if name not in types:
        from difflib import get_close_matches

        close = get_close_matches(str(name), map(str, types), 1)
        raise UsageError(
            f"unknown setting {short(name)}" + (f"; did you mean {close[0]}?" if close else ""),
            f"use one of {', '.join(sorted(map(str, types)))}",
        )
    if value == "preset" or (value is None and name in _WITH_PRESET):  # as old runs wrote it
        return None
    wanted = types[name]
    if wanted is str and isinstance(value, bool):  # YAML's yes and no
        value = "yes" if value else "no"
    try:
        if isinstance(value, bool) or (wanted is str and not isinstance(value, str)):
            raise ValueError
        if wanted is int and float(value) != int(float(value)):
            raise ValueError
        return wanted(float(value)) if wanted is int else wanted(value)
    except (TypeError, ValueError, OverflowError):
        words = {int: "a whole number", float: "a number", str: "text"}
        raise UsageError(
            f"setting {name} is {short(value)[:200]}", f"give {words[wanted]}"
        ) from None


_WITH_PRESET = {s.name for s in settings_of(Recipe) if len(set(s.defaults)) > 1}
