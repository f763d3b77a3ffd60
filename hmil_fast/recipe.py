"""The presets: what the terms of the training loss are and what they weigh, side by side."""

from dataclasses import dataclass
from math import inf
from typing import Any

from hmil_fast.errors import UsageError

CHOICES = {
    "hierarchy": ("ce", "marginal", "hxe", "soft"),
    "coarse": ("head", "sum"),
    "readout": ("paper", "evidence"),
    "class_weights": ("none", "balanced"),
    "curriculum": ("linear", "square", "constant"),
    "lr_schedule": ("constant", "cosine"),
    "hba": ("nll", "released", "none"),
    "ham": ("sum", "mean", "none"),
    "supcon": ("leaf", "levels", "released", "none"),
}


@dataclass(frozen=True)
class LossSettings:
    """What a preset decides: `HmilLoss`, and how the model is taught and read.

    Each setting can be given to `hmil-fast train` as key=value.

    With progress p = e/E the curriculum is a pair of weights, one falling (of coarse, HBA, HAM) and
    one rising (of SupCon), and the loss is

        hierarchy + falling · (coarse_weight · heads + hba_weight · HBA + ham_weight · HAM)
                  + rising · supcon_weight · SupCon + the model's own loss, if it has one.

    Attributes:
        hierarchy: What the leaf logits learn. "ce": cross-entropy. "marginal": NLL of the true node
            of every level, probabilities summed up from the leaves, mean over the levels. "hxe" and
            "soft": the two losses of Bertinetto et al. (CVPR 2020).
        hxe_alpha: α of hxe: −log p(node | parent) weighs exp(−α · edges from the root to the node):
            the larger, the dearer a mistake far off in the tree; 0 is ce.
        soft_beta: β of soft: the target of a leaf is proportional to exp(−β d), where d is the
            height of the common ancestor with the true leaf over that of the root; large is ce.
        coarse: The evidence for a coarse class is that of its own "head", or ("sum") of its best
            leaf, see `hmil_fast.metrics.decision`. The loss does not read it.
        readout: Of the model, as `HMIL` describes it. The loss does not read it.
        instance_dropout: Share of a bag's instances that a training step leaves out; a bag in
            chunks keeps all. The loss does not read it.
        feature_dropout: Share of the features' entries that a training step leaves out. The loss
            does not read it.
        lr: Learning rate of Adam, at its highest. From here to ema settings are of training; the
            loss does not read them.
        weight_decay: Of Adam.
        patience: Epochs without a better validation score (balanced accuracy of the leaves; then
            their loss) after which a fold stops. A rate that falls wants all epochs.
        lr_schedule: Of the learning rate: "constant", or "cosine", which falls to 0 at `epochs`.
            The authors' code divides it by 10 after 5 epochs without progress, "released" does not.
        warmup: Share of all epochs over which the learning rate rises to what it is given as.
        ema: Decay a step of the moving average of the weights, which is what is validated, saved
            and exported; 0 takes the weights as they are.
        label_smoothing: ε spread evenly over the classes, in hierarchy and in the heads.
        class_weights: "balanced": a bag weighs n / (classes · n of its leaf) in hierarchy.
        curriculum: Falling weight: "linear" 1 − p, "square" 1 − p²; the rising one is what it lacks
            of 1. "constant": both are 1.
        coarse_weight: Of the cross-entropy of the heads above the leaves.
        hba: Bag alignment as "nll", or as "released": a second softmax, and no curriculum.
        hba_weight: Of bag alignment.
        ham: Instance alignment with the "sum" or the "mean" of the children's attentions.
        ham_weight: Of instance alignment; where it is 0 the term is reported only.
        supcon: Contrast by the "leaf"; by all "levels" (Zhang et al., CVPR 2022); or as "released":
            τ falls to tau and rises again, × τ/tau, ÷ bags.
        supcon_weight: Of SupCon.
        tau: Temperature of SupCon.
        supcon_memory: Slides of each leaf, from earlier steps, that a step is contrasted with too.
    """

    hierarchy: str
    hxe_alpha: float
    soft_beta: float
    coarse: str
    readout: str
    instance_dropout: float
    feature_dropout: float
    lr: float
    weight_decay: float
    patience: int
    lr_schedule: str
    warmup: float
    ema: float
    label_smoothing: float
    class_weights: str
    curriculum: str
    coarse_weight: float
    hba: str
    hba_weight: float
    ham: str
    ham_weight: float
    supcon: str
    supcon_weight: float
    tau: float
    supcon_memory: int

    def __post_init__(self) -> None:
        """Refuse values that no loss could use."""
        checks = {
            name: (getattr(self, name) in words, f"choose one of {', '.join(words)}")
            for name, words in CHOICES.items()
        }
        for name in ("hxe_alpha", "coarse_weight", "hba_weight", "ham_weight", "supcon_weight"):
            checks[name] = (0 <= getattr(self, name) < inf, "give 0 or more")
        checks["soft_beta"] = (0 < self.soft_beta < inf, "give a positive number")
        checks["lr"] = (0 < self.lr < inf, "give a positive number")
        checks["weight_decay"] = (0 <= self.weight_decay < inf, "give 0 or more")
        checks["patience"] = (self.patience >= 1, "give at least 1")
        for name in ("instance_dropout", "feature_dropout", "warmup", "ema", "label_smoothing"):
            checks[name] = (0 <= getattr(self, name) < 1, "give 0 or more, less than 1")
        checks["tau"] = (0 < self.tau < inf, "give a positive number")
        checks["supcon_memory"] = (0 <= self.supcon_memory <= 65_536, "give 0 to 65536")
        if self.supcon == "released" and self.supcon_memory:
            checks["supcon_memory"] = (False, "give 0 with supcon=released, which has no memory")
        for name, (good, fix) in checks.items():
            if not good:
                raise UsageError(f"setting {name} is {getattr(self, name)!r}", fix)


_NAMES = ("best", "paper", "released")
_TABLE: dict[str, tuple[Any, Any, Any]] = {
    #                     best        paper     released
    "hierarchy":         ("marginal", "ce",     "ce"),
    "hxe_alpha":         (0.1,        0.1,      0.1),
    "soft_beta":         (10.0,       10.0,     10.0),
    "coarse":            ("sum",      "head",   "head"),
    "readout":           ("evidence", "paper",  "paper"),
    "instance_dropout":  (0.5,        0.0,      0.0),
    "feature_dropout":   (0.25,       0.0,      0.0),
    "lr":                (6e-3,       1e-4,     1e-4),
    "weight_decay":      (3e-3,       0.0,      0.0),
    "patience":          (10_000,     30,       30),
    "lr_schedule":       ("cosine",   "constant", "constant"),
    "warmup":            (0.1,        0.0,      0.0),
    "ema":               (0.95,       0.0,      0.0),
    "label_smoothing":   (0.05,       0.0,      0.0),
    "class_weights":     ("balanced", "none",   "none"),
    "curriculum":        ("constant", "linear", "square"),
    "coarse_weight":     (0.1,        1.0,      1.0),
    "hba":               ("none",     "nll",    "released"),
    "hba_weight":        (1.0,        1.0,      1.0),
    "ham":               ("none",     "sum",    "sum"),
    "ham_weight":        (1.0,        1.0,      0.0),
    "supcon":            ("levels",   "leaf",   "released"),
    "supcon_weight":     (0.3,        1.0,      1.0),
    "tau":               (0.1,        0.1,      0.1),
    "supcon_memory":     (8,          0,        0),
}  # fmt: skip

PRESETS = {
    preset: LossSettings(**{name: row[column] for name, row in _TABLE.items()})
    for column, preset in enumerate(_NAMES)
}
