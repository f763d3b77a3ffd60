"""The methods of `make evaluate` and the settings that they share."""

from dataclasses import asdict, dataclass, replace

from hmil_fast.config import MODELS, PRESETS
from hmil_fast.recipe import Recipe

YARDSTICK = "pooled-lr"
TREES_ONLY = (
    "flat",
    "best-flat",
    "abmil-published",
    "clam-published",
)  # not run on the classic sets
# what the baselines were published with: cross-entropy of the leaves
PUBLISHED = replace(
    PRESETS["paper"],
    hierarchy="ce",
    coarse="sum",
    curriculum="constant",
    coarse_weight=0.0,
    hba="none",
    ham="none",
    supcon="none",
)
# the same, trained as `best` is
PLAIN = replace(
    PUBLISHED,
    class_weights=PRESETS["best"].class_weights,
    lr_schedule=PRESETS["best"].lr_schedule,
    warmup=PRESETS["best"].warmup,
    ema=PRESETS["best"].ema,
)

# `best` without all that knows the tree
BEST_FLAT = replace(PRESETS["best"], hierarchy="ce", supcon="leaf", coarse_weight=0.0)


@dataclass(frozen=True)
class Strength:
    """How hard a method is kept from learning its training bags by heart.

    Attributes:
        instance_dropout: Share of a bag's instances that a step leaves out.
        feature_dropout: Share of the features' entries that a step leaves out.
        weight_decay: Of Adam.
    """

    instance_dropout: float
    feature_dropout: float
    weight_decay: float


STRENGTHS = {
    "none": Strength(0.0, 0.0, 1e-4),
    "classic": Strength(0.0, 0.25, 1e-4),
    "light": Strength(0.5, 0.1, 3e-3),
    "middle": Strength(0.5, 0.25, 3e-3),
    "heavy": Strength(0.7, 0.25, 1e-2),
}


@dataclass(frozen=True)
class Method:
    """One row of the table; all but name, model, loss, lr and strength are alike for all rows.

    Attributes:
        name: Its name in the table.
        model: One of `hmil_fast.config.MODELS`, or `YARDSTICK`.
        loss: A preset of HMIL, `BEST_FLAT`, `PLAIN` or `PUBLISHED`.
        lr: Learning rate of Adam; see `TUNED`.
        strength: Of the regularisation, one of `STRENGTHS`.
        hidden: Width of the hidden layer.
        batch_bags: Bags in a step.
    """

    name: str
    model: str
    loss: Recipe
    lr: float = 4e-3
    strength: str = "none"
    hidden: int = 64
    batch_bags: int = 16

    @property
    def published(self) -> bool:
        """Whether it is trained as it was published: constant rate, an epoch that is chosen."""
        return self.name in CONSTANT["fashion"]

    def fingerprint(self) -> str:
        """All settings in one line; of a preset's own, those that `strength` sets are not used."""
        settings = asdict(self) | asdict(STRENGTHS[self.strength])
        for name in ("lr", "patience", *asdict(STRENGTHS[self.strength])):
            del settings["loss"][name]
        return repr(sorted(settings.items()))


# learning rate and strength of `best` and the baselines as `search` found them
TUNED: dict[str, dict[str, tuple[float, str]]] = {
    "fashion": {
        "best": (4.8e-2, "light"),
        "best-flat": (2.4e-2, "middle"),
        "flat": (1.2e-2, "light"),
        "abmil": (2.4e-2, "middle"),
        "clam": (4.8e-2, "middle"),
        "dsmil": (6e-3, "light"),
        "mean": (2.4e-2, "light"),
        "max": (4.8e-2, "light"),
    },
    "pcam": {
        "best": (4.8e-2, "heavy"),
        "best-flat": (4.8e-2, "heavy"),
        "flat": (1.2e-2, "heavy"),
        "abmil": (2.4e-2, "middle"),
        "clam": (4.8e-2, "heavy"),
        "dsmil": (6e-3, "middle"),
        "mean": (2.4e-2, "heavy"),
        "max": (1.2e-2, "middle"),
    },
}
# learning rate of what is trained as it was published
CONSTANT = {
    "fashion": {"paper": 2e-3, "released": 6e-3, "abmil-published": 1.2e-2, "clam-published": 6e-3},
    "pcam": {"paper": 2e-3, "released": 2e-3, "abmil-published": 6e-3, "clam-published": 2e-3},
}


def methods(task: str = "") -> list[Method]:
    """Every preset of HMIL, every baseline that the library has, and the yardstick."""
    found = [Method(name, "hmil", loss) for name, loss in PRESETS.items()]
    found.append(Method("best-flat", "flat", BEST_FLAT))
    found += [Method(name, name, PLAIN) for name in MODELS if name != "hmil"]
    found += [Method(f"{name}-published", name, PUBLISHED) for name in ("abmil", "clam")]
    found.append(Method(YARDSTICK, YARDSTICK, PLAIN))
    if task == "one-and-five":  # for the rule of the decision, not for a contest of methods
        found = [method for method in found if method.name in ("best", "abmil")]
        task = "fashion"
    tuned, constant = TUNED.get(task, {}), CONSTANT.get(task, {})
    for i, method in enumerate(found):
        if method.published:
            found[i] = replace(method, lr=constant.get(method.name, 2e-3))
        elif method.model != YARDSTICK:
            lr, strength = tuned.get(method.name, (method.lr, "classic"))
            found[i] = replace(method, lr=lr, strength=strength)
    return found
