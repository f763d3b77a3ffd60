"""Settings of a training run: one frozen dataclass, read from YAML, overridden by key=value."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as short
from typing import Any

from hmil_fast.errors import UsageError
from hmil_fast.presets import PRESETS, LossSettings

__all__ = ["MODELS", "PRESETS", "Runtime", "TrainConfig", "load_config", "loss_settings"]

MODELS = ("hmil", "flat", "abmil", "clam", "dsmil", "mean", "max")
CACHES = ("auto", "device", "host", "map", "stream")
PRECISIONS = ("auto", "fp32", "bf16")
STANDARDISE = ("auto", "none")


@dataclass(frozen=True)
class Runtime:
    """Where and how a run computes. It is not part of a run's identity.

    Attributes:
        device: "auto", "cpu" or "cuda[:i]".
        cache: Where features are kept, one of `CACHES`; "auto" takes the first they fit in.
        precision: Of products, one of `PRECISIONS`; "auto" is bf16 where the hardware has it.
            Weights, sums and losses are fp32 in any case.
        threads: Threads of a CPU's products; 0 leaves the number to torch.
    """

    device: str = "auto"
    cache: str = "auto"
    precision: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        checks = {
            "cache": (self.cache in CACHES, f"choose one of {', '.join(CACHES)}"),
            "precision": (self.precision in PRECISIONS, f"choose one of {', '.join(PRECISIONS)}"),
            "threads": (0 <= self.threads <= 4096, "give 0 to 4096"),
        }
        for name, (good, fix) in checks.items():
            if not good:
                raise UsageError(f"setting {name} is {getattr(self, name)!r}", fix)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `hmil-fast train`.

    Attributes:
        model: One of `MODELS`.
        baseline: Trained beside the model on the same splits: one of `MODELS`, or "none".
        preset: What `LossSettings` a run starts from, one of `PRESETS`. The settings from
            `hierarchy` on are those of `LossSettings`: None, or "preset", is what the preset says;
            `loss_settings` fills them in.
        folds: Folds of the patient-grouped cross-validation; ignored for official splits.
        mpp: µm per px of the features, where the store has several scales; 0 is the finest.
        scales: "one", that of mpp, or "all": the finest tiles, each with the features of the
            coarser tiles that it lies in behind its own.
        views: Augmented views of the store to train on: each time a slide is drawn, it is in one
            of them or as it is. Validation and prediction take the tiles as they are.
        seed: Seed of splits, initial weights and the order of bags.
        epochs: Length of the loss schedule, and the most epochs that are trained.
        batch_bags: The most bags in one optimiser step.
        batch_instances: The most instances in one optimiser step; one larger bag goes alone.
        hidden: Width of the instance embedding.
        dropout: Dropout on the gated activations of the attention.
        val_fraction: Share of the training patients kept for validation.
        balance: "leaf" draws every leaf as often as any other while training, "none" every slide
            once an epoch.
        cache: Where features are kept, one of `CACHES`; "auto" takes the first they fit in.
        precision: Of products, one of `PRECISIONS`; "auto" is bf16 where the hardware has it.
            Weights, sums and losses are fp32 in any case.
        standardise: "auto" brings features whose columns differ by orders of magnitude to mean 0
            and deviation 1 of the training bags; "none" takes them as they are.
        device: "auto", "cpu" or "cuda[:i]".
    """

    model: str = "hmil"
    baseline: str = "mean"
    preset: str = "best"
    folds: int = 5
    mpp: float = 0.0
    scales: str = "one"
    views: int = 0
    seed: int = 0
    epochs: int = 200
    batch_bags: int = 64
    batch_instances: int = 262_144
    hidden: int = 256
    dropout: float = 0.0
    val_fraction: float = 0.2
    balance: str = "none"
    cache: str = "auto"
    precision: str = "auto"
    standardise: str = "auto"
    device: str = "auto"
    hierarchy: str | None = None
    hxe_alpha: float | None = None
    soft_beta: float | None = None
    coarse: str | None = None
    readout: str | None = None
    instance_dropout: float | None = None
    feature_dropout: float | None = None
    lr: float | None = None
    weight_decay: float | None = None
    patience: int | None = None
    lr_schedule: str | None = None
    warmup: float | None = None
    ema: float | None = None
    label_smoothing: float | None = None
    class_weights: str | None = None
    curriculum: str | None = None
    coarse_weight: float | None = None
    hba: str | None = None
    hba_weight: float | None = None
    ham: str | None = None
    ham_weight: float | None = None
    supcon: str | None = None
    supcon_weight: float | None = None
    tau: float | None = None
    supcon_memory: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        checks = {
            "model": (self.model in MODELS, f"choose one of {', '.join(MODELS)}"),
            "baseline": (
                self.baseline in (*MODELS, "none"),
                f"choose none, or one of {', '.join(MODELS)}",
            ),
            "preset": (self.preset in PRESETS, f"choose one of {', '.join(PRESETS)}"),
            "balance": (self.balance in ("none", "leaf"), "choose none or leaf"),
            "cache": (self.cache in CACHES, f"choose one of {', '.join(CACHES)}"),
            "precision": (self.precision in PRECISIONS, f"choose one of {', '.join(PRECISIONS)}"),
            "standardise": (self.standardise in STANDARDISE, "choose auto or none"),
            "folds": (self.folds >= 2, "give at least 2"),
            "mpp": (0 <= self.mpp < float("inf"), "give µm per px, or 0 for the finest scale"),
            "scales": (
                self.scales in ("one", "all"),
                'give "one" for the scale of mpp, or "all" without mpp',
            ),
            "views": (0 <= self.views <= 64, "give 0 to 64"),
            "seed": (0 <= self.seed < 2**31, "give 0 to 2147483647"),
            "epochs": (self.epochs >= 1, "give at least 1"),
            "batch_bags": (self.batch_bags >= 1, "give at least 1"),
            "batch_instances": (self.batch_instances >= 1, "give at least 1"),
            "hidden": (1 <= self.hidden <= 65_536, "give 1 to 65536"),
            "dropout": (0 <= self.dropout < 1, "give 0 or more, less than 1"),
            "val_fraction": (0 < self.val_fraction <= 0.5, "give a share of at most 0.5"),
        }
        for name, (good, fix) in checks.items():
            if not good:
                raise UsageError(f"setting {name} is {getattr(self, name)!r}", fix)
        if self.scales == "all" and self.mpp:
            raise UsageError(
                f"the settings mpp={self.mpp:g} and scales=all contradict each other",
                "leave out mpp to train on all scales, or scales to train on that one",
            )
        loss_settings(self)

    def fingerprint(self) -> str:
        """A hash of all settings: two runs with one fingerprint do the same work."""
        settings = dataclasses.asdict(self) | dataclasses.asdict(loss_settings(self))
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The settings as YAML, read back by `load_config`."""
        import yaml  # here, so that --help needs nothing installed

        meant = dataclasses.asdict(loss_settings(self))
        lines = []
        for name, value in dataclasses.asdict(self).items():
            said = yaml.safe_dump({name: "preset" if value is None else value}).rstrip()
            lines.append(f"{said}  # {meant[name]}" if value is None else said)
        return "\n".join(lines) + "\n"


def loss_settings(config: TrainConfig) -> LossSettings:
    """How a run is taught: what its preset says, but for the settings that the run itself gives.

    The model flat learns from the leaves alone: terms that know the levels above are left out.

    Raises:
        UsageError: A value that no loss could use.
    """
    names = [field.name for field in dataclasses.fields(LossSettings)]
    own = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    settings = dataclasses.replace(PRESETS[config.preset], **own)
    if config.model != "flat":
        return settings
    by_leaf = "leaf" if settings.supcon == "levels" else settings.supcon
    return dataclasses.replace(
        settings, hierarchy="ce", coarse_weight=0.0, hba="none", ham="none", supcon=by_leaf
    )


def load_config(
    file: Path | None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Settings from a YAML file; command-line flags and key=value overrides win over it.

    Raises:
        UsageError: Unreadable file, unknown setting, a value of the wrong type, or a flag and a
            key=value that say different things of one setting.
    """
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
    return TrainConfig(**{name: _typed(name, value) for name, value in values.items()})


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _typed(name: object, value: Any) -> Any:
    settings = TrainConfig()
    preset = dataclasses.asdict(loss_settings(settings))
    # where the preset decides, the default is None and tells no type
    fields = {n: type(v) for n, v in (dataclasses.asdict(settings) | preset).items()}
    if name not in fields:
        close = get_close_matches(str(name), fields, 1)
        raise UsageError(
            f"unknown setting {short(name)}" + (f"; did you mean {close[0]}?" if close else ""),
            f"use one of {', '.join(sorted(fields))}",
        )
    if name in preset and value in (None, "preset"):
        return None
    kind = fields[str(name)]
    if kind is str and isinstance(value, bool):  # YAML's yes and no
        value = "yes" if value else "no"
    try:
        if isinstance(value, bool) or (kind is str and not isinstance(value, str)):
            raise ValueError
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        return kind(float(value)) if kind is int else kind(value)
    except (TypeError, ValueError, OverflowError):
        words = {int: "a whole number", float: "a number", str: "text"}
        raise UsageError(f"setting {name} is {short(value)[:200]}", f"give {words[kind]}") from None
