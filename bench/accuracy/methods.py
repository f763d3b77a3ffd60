"""The methods of `make evaluate` and the settings that they share."""

from dataclasses import asdict, dataclass, replace

from hmil_fast.config import MODELS, PRESETS
from hmil_fast.presets import LossSettings

YARDSTICK = "pooled-lr"
# what the baselines were published with: cross-entropy of the leaves
PLAIN = replace(
    PRESETS["paper"],
    hierarchy="ce",
    coarse="sum",
    curriculum="constant",
    coarse_weight=0.0,
    hba="none",
    ham="none",
    supcon="none",
)


@dataclass(frozen=True)
class Method:
    """One row of the table; all but name, model, loss and lr are alike for all rows.

    Attributes:
        name: Its name in the table.
        model: One of `hmil_fast.config.MODELS`, or `YARDSTICK`.
        loss: A preset of HMIL, or `PLAIN`.
        lr: Learning rate of Adam; see `LEARNING_RATES`.
        weight_decay: Of Adam.
        hidden: Width of the hidden layer.
        batch_bags: Bags in a step.
        feature_dropout: Probability of dropping an entry of a feature while training.
        val_fraction: Share of the training bags that selects the epoch.
    """

    name: str
    model: str
    loss: LossSettings
    lr: float = 2e-3
    weight_decay: float = 1e-4
    hidden: int = 64
    batch_bags: int = 16
    feature_dropout: float = 0.25
    val_fraction: float = 0.2

    def fingerprint(self) -> str:
        """All settings in one line."""
        return repr(sorted(asdict(self).items()))


# of 3e-4, 1e-3 and 3e-3 the one with the best validation score on cohorts that are not reported
LEARNING_RATES: dict[str, float] = {}


def methods() -> list[Method]:
    """Every preset of HMIL, every baseline that the library has, and the yardstick."""
    found = [Method(name, "hmil", loss) for name, loss in PRESETS.items()]
    found += [Method(name, name, PLAIN) for name in MODELS if name != "hmil"]
    found.append(Method(YARDSTICK, YARDSTICK, PLAIN))
    return [replace(m, lr=LEARNING_RATES.get(m.name, m.lr)) for m in found]
