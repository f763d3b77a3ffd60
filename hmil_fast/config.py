"""Settings of a training run: one frozen dataclass, read from YAML, overridden by key=value."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hmil_fast.errors import UsageError

MODELS = ("hmil", "mean")
PRESETS = ("paper", "released")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `hmil-fast train`.

    Attributes:
        model: One of `MODELS`.
        baseline: Trained beside the model on the same splits: "mean" or "none".
        preset: Loss weights and schedule of HMIL, one of `PRESETS` (DESIGN section 6).
        folds: Folds of the patient-grouped cross-validation; ignored for official splits.
        seed: Seed of splits, initial weights and the order of bags.
        epochs: Length of the loss schedule, and the most epochs that are trained.
        patience: Epochs without a better validation loss after which a fold stops.
        lr: Learning rate of Adam.
        weight_decay: Weight decay of Adam.
        batch_bags: The most bags in one optimiser step.
        batch_instances: The most instances in one optimiser step; one larger bag goes alone.
        hidden: Width of the instance embedding.
        dropout: Dropout on the gated activations of the attention.
        val_fraction: Share of the training patients kept for validation.
        device: "auto", "cpu" or "cuda[:i]".
    """

    model: str = "hmil"
    baseline: str = "mean"
    preset: str = "paper"
    folds: int = 5
    seed: int = 0
    epochs: int = 200
    patience: int = 30
    lr: float = 1e-4
    weight_decay: float = 0.0
    batch_bags: int = 64
    batch_instances: int = 262_144
    hidden: int = 256
    dropout: float = 0.0
    val_fraction: float = 0.2
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        checks = {
            "model": (self.model in MODELS, f"choose one of {', '.join(MODELS)}"),
            "baseline": (self.baseline in ("mean", "none"), "choose mean or none"),
            "preset": (self.preset in PRESETS, f"choose one of {', '.join(PRESETS)}"),
            "folds": (self.folds >= 2, "give at least 2"),
            "epochs": (self.epochs >= 1, "give at least 1"),
            "patience": (self.patience >= 1, "give at least 1"),
            "lr": (0 < self.lr < float("inf"), "give a positive number"),
            "weight_decay": (0 <= self.weight_decay < float("inf"), "give 0 or more"),
            "batch_bags": (self.batch_bags >= 1, "give at least 1"),
            "batch_instances": (self.batch_instances >= 1, "give at least 1"),
            "hidden": (1 <= self.hidden <= 65_536, "give 1 to 65536"),
            "dropout": (0 <= self.dropout < 1, "give 0 or more, less than 1"),
            "val_fraction": (0 < self.val_fraction <= 0.5, "give a share of at most 0.5"),
        }
        for name, (good, fix) in checks.items():
            if not good:
                raise UsageError(f"setting {name} is {getattr(self, name)!r}", fix)

    def fingerprint(self) -> str:
        """A hash of all settings: two runs with one fingerprint do the same work."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The settings as YAML, read back by `load_config`."""
        return str(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))


def load_config(
    file: Path | None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Settings from a YAML file, then command-line flags, then key=value overrides; the last wins.

    Raises:
        UsageError: Unreadable file, unknown setting, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"cannot read the settings {file}: {error}", "correct it") from None
        if not isinstance(loaded, dict | None):
            raise UsageError(f"{file} holds no settings", "write one `name: value` a line")
        values.update(loaded or {})
    values.update({k: v for k, v in (flags or {}).items() if v is not None})
    for pair in overrides:
        name, sign, text = pair.partition("=")
        if not sign:
            raise UsageError(f"{pair!r} is not of the form key=value", "write for instance lr=1e-3")
        values[name] = yaml.safe_load(text)
    return TrainConfig(**{name: _typed(name, value) for name, value in values.items()})


def _typed(name: object, value: Any) -> Any:
    fields = {name: type(value) for name, value in dataclasses.asdict(TrainConfig()).items()}
    if name not in fields:
        raise UsageError(f"unknown setting {name!r}", f"use one of {', '.join(sorted(fields))}")
    kind = fields[str(name)]
    try:
        if isinstance(value, bool) or (kind is int and float(value) != int(float(value))):
            raise ValueError
        return kind(float(value)) if kind is int else kind(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(
            f"setting {name} is {value!r}", f"give a value of type {kind.__name__}"
        ) from None
