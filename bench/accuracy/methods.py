"""The methods of `make evaluate` and the settings that they share."""

from dataclasses import asdict, dataclass, replace

from hmil_fast.config import MODELS, PRESETS
from hmil_fast.presets import LossSettings

YARDSTICK = "pooled-lr"
# what the baselines were published with, cross-entropy of the leaves, trained as `best` is
PLAIN = replace(
    PRESETS["paper"],
    hierarchy="ce",
    coarse="sum",
    curriculum="constant",
    coarse_weight=0.0,
    hba="none",
    ham="none",
    supcon="none",
    feature_dropout=PRESETS["best"].feature_dropout,
    lr_schedule=PRESETS["best"].lr_schedule,
    warmup=PRESETS["best"].warmup,
    ema=PRESETS["best"].ema,
)


@dataclass(frozen=True)
class Method:
    """One row of the table; all but name, model, loss and lr are alike for all rows.

    Attributes:
        name: Its name in the table.
        model: One of `hmil_fast.config.MODELS`, or `YARDSTICK`.
        loss: A preset of HMIL, or `PLAIN`.
        lr: Learning rate of Adam; see `TUNED`.
        weight_decay: Of Adam.
        hidden: Width of the hidden layer.
        batch_bags: Bags in a step.
    """

    name: str
    model: str
    loss: LossSettings
    lr: float = 4e-3
    weight_decay: float = 1e-4
    hidden: int = 64
    batch_bags: int = 16

    def fingerprint(self) -> str:
        """All settings in one line; of a preset's own rate, decay and patience none is used."""
        settings = asdict(self)
        for name in ("lr", "weight_decay", "patience"):
            del settings["loss"][name]
        return repr(sorted(settings.items()))


# learning rate and weight decay of `best` and the baselines as `search` found them
TUNED: dict[str, dict[str, tuple[float, float]]] = {
    "fashion": {
        "best": (1.2e-2, 3e-3),
        "flat": (2e-2, 1e-4),
        "abmil": (1.2e-2, 3e-3),
        "clam": (2e-2, 1e-4),
        "dsmil": (1.2e-2, 3e-3),
        "mean": (1.2e-2, 3e-3),
        "max": (2e-2, 3e-3),
    },
    "pcam": {
        "best": (6e-3, 3e-3),
        "flat": (6e-3, 1e-4),
        "abmil": (2e-2, 3e-3),
        "clam": (1.2e-2, 3e-3),
        "dsmil": (6e-3, 3e-3),
        "mean": (1.2e-2, 1e-4),
        "max": (1.2e-2, 1e-4),
    },
}
# of the presets as published, whose learning rate does not fall
CONSTANT = {"fashion": {"paper": 2e-3, "released": 6e-3}, "pcam": {"paper": 2e-3, "released": 2e-3}}


def methods(task: str = "") -> list[Method]:
    """Every preset of HMIL, every baseline that the library has, and the yardstick."""
    found = [Method(name, "hmil", loss) for name, loss in PRESETS.items()]
    found += [Method(name, name, PLAIN) for name in MODELS if name != "hmil"]
    found.append(Method(YARDSTICK, YARDSTICK, PLAIN))
    tuned, constant = TUNED.get(task, {}), CONSTANT.get(task, {})
    for i, method in enumerate(found):
        lr, decay = tuned.get(method.name, (method.lr, method.weight_decay))
        if method.name in ("paper", "released"):
            lr = constant.get(method.name, 2e-3)
        found[i] = replace(method, lr=lr, weight_decay=decay)
    return found
