"""Recipe: what a model is and how it is trained; and the presets best, paper and released."""

from dataclasses import dataclass, replace

from hmil_fast.errors import UsageError
from hmil_fast.settings import (
    NOT_NEGATIVE,
    POSITIVE,
    PRESET_NAMES,
    SHARE,
    Allowed,
    check_settings,
    one_of,
    setting,
    settings_of,
    whole,
)

MODELS = ("hmil", "flat", "abmil", "clam", "dsmil", "mean", "max")

# a step of 1/256 is the resolution of `hmil_fast.bags.dropout.drop_features`
_FEATURE_SHARE = Allowed(
    "0, or 0.002 to 0.998",
    lambda value: value == 0 or 0.002 <= value <= 0.998,
    "give 0, or 0.002 to 0.998",
)


@dataclass(frozen=True)
class Recipe:
    """What a model is and how it is trained; the defaults are the preset `best`.

    With progress p = e/E the curriculum is a pair of weights, one falling (of coarse, HBA, HAM) and
    one rising (of SupCon), and the loss is

        hierarchy + falling · (coarse_weight · heads + hba_weight · HBA + ham_weight · HAM)
                  + rising · supcon_weight · SupCon + the model's own loss, if it has one.

    The model `flat` has the leaves alone and learns without the terms of the levels above them, see
    `loss_terms`.

    Each field is described where it is declared; `hmil-fast settings` prints the descriptions.

    Example:
        >>> from hmil_fast import Recipe
        >>> Recipe(model="abmil", epochs=50).lr
        0.006

    Raises:
        UsageError: A value that is not allowed.
    """

    model: str = setting("hmil", one_of(*MODELS), "Model.")
    hidden: int = setting(256, whole(1, 65_536), "Width of the instance embedding.")
    dropout: float = setting(0.0, SHARE, "Dropout on the gated activations of the attention.")
    epochs: int = setting(
        200,
        whole(1),
        "Number of epochs, and length of the schedules of loss and learning rate.",
    )
    batch_bags: int = setting(64, whole(1), "Most bags in one optimiser step.")
    batch_instances: int = setting(
        262_144,
        whole(1),
        "Most instances in one optimiser step; a larger bag is a step alone.",
    )
    balance: str = setting(
        "none",
        one_of("none", "leaf"),
        "Sampling of training slides: none takes every slide once an epoch, leaf draws every leaf "
        "equally often.",
    )
    standardise: str = setting(
        "auto",
        one_of("auto", "none"),
        "Standardisation of features: auto brings columns that differ by orders of magnitude to "
        "mean 0 and deviation 1 of the training bags, none takes features as they are.",
    )
    hierarchy: str = setting(
        "marginal",
        one_of("ce", "marginal", "hxe", "soft"),
        "Loss of the leaf logits: ce is cross-entropy; marginal is the NLL of the true node of "
        "every level, probabilities summed up from the leaves, mean over the levels; hxe and soft "
        "are the two losses of Bertinetto et al. (CVPR 2020).",
        "ce",
        "ce",
    )
    hxe_alpha: float = setting(
        0.1,
        NOT_NEGATIVE,
        "α of hxe: −log p(node | parent) has weight exp(−α · edges from the root to the node); 0 "
        "is cross-entropy.",
    )
    soft_beta: float = setting(
        10.0,
        POSITIVE,
        "β of soft: the target of a leaf is proportional to exp(−β d), where d is the height of "
        "the common ancestor with the true leaf, divided by that of the root.",
    )
    coarse: str = setting(
        "sum",
        one_of("head", "sum"),
        "Evidence for a node above the leaves: head is its level's head, sum is its best leaf.",
        "head",
        "head",
    )
    readout: str = setting(
        "evidence",
        one_of("paper", "evidence"),
        "Class logits: paper has one weight vector per level, on the attention-weighted mean of a "
        "class; evidence has one per class and adds its attention mass and the bag's mean.",
        "paper",
        "paper",
    )
    instance_dropout: float = setting(
        0.5,
        SHARE,
        "Share of a bag's instances that a training step leaves out; a bag in chunks keeps all.",
        0.0,
        0.0,
    )
    feature_dropout: float = setting(
        0.25,
        _FEATURE_SHARE,
        "Share of the feature entries that a training step sets to 0, in steps of 1/256.",
        0.0,
        0.0,
    )
    lr: float = setting(6e-3, POSITIVE, "Learning rate of Adam at its peak.", 1e-4, 1e-4)
    weight_decay: float = setting(3e-3, NOT_NEGATIVE, "Weight decay of Adam.", 0.0, 0.0)
    patience: int = setting(
        10_000,
        whole(1),
        "Epochs without a better validation score (balanced accuracy of the leaves, then their "
        "loss) after which a fold stops.",
        30,
        30,
    )
    lr_schedule: str = setting(
        "cosine",
        one_of("constant", "cosine"),
        "Schedule of the learning rate: cosine falls to 0 at the last epoch. The authors' code "
        "divides it by 10 after 5 epochs without progress; the preset released does not.",
        "constant",
        "constant",
    )
    warmup: float = setting(
        0.1, SHARE, "Share of all epochs over which the learning rate rises to its peak.", 0.0, 0.0
    )
    ema: float = setting(
        0.95,
        SHARE,
        "Decay per step of the EMA of the weights, which is validated, saved and exported; 0 takes "
        "the weights as they are.",
        0.0,
        0.0,
    )
    label_smoothing: float = setting(
        0.05, SHARE, "Label smoothing ε of hierarchy and of the heads.", 0.0, 0.0
    )
    class_weights: str = setting(
        "balanced",
        one_of("none", "balanced"),
        "Weights of the bags in hierarchy: balanced is n / (classes · n of the bag's leaf).",
        "none",
        "none",
    )
    curriculum: str = setting(
        "constant",
        one_of("linear", "square", "constant"),
        "Falling weight of the curriculum: linear is 1 − p, square is 1 − p²; the rising weight is "
        "1 minus the falling one. With constant both are 1.",
        "linear",
        "square",
    )
    coarse_weight: float = setting(
        0.1, NOT_NEGATIVE, "Weight of the cross-entropy of the heads above the leaves.", 1.0, 1.0
    )
    hba: str = setting(
        "none",
        one_of("nll", "released", "none"),
        "Bag alignment: nll, or released with a second softmax and without the curriculum.",
        "nll",
        "released",
    )
    hba_weight: float = setting(1.0, NOT_NEGATIVE, "Weight of the bag alignment.")
    ham: str = setting(
        "none",
        one_of("sum", "mean", "none"),
        "Instance alignment: sum or mean of the children's attentions.",
        "sum",
        "sum",
    )
    ham_weight: float = setting(
        1.0, NOT_NEGATIVE, "Weight of the instance alignment; with 0 it is only reported.", 1.0, 0.0
    )
    supcon: str = setting(
        "levels",
        one_of("leaf", "levels", "released", "none"),
        "Supervised contrastive loss: by the leaf; by all levels (Zhang et al., CVPR 2022); or "
        "released, where τ falls to tau and rises again, times τ/tau, divided by the bags.",
        "leaf",
        "released",
    )
    supcon_weight: float = setting(
        0.3, NOT_NEGATIVE, "Weight of the supervised contrastive loss.", 1.0, 1.0
    )
    tau: float = setting(0.1, POSITIVE, "Temperature of the supervised contrastive loss.")
    supcon_memory: int = setting(
        8,
        whole(0, 65_536),
        "Slides per leaf from earlier steps that a step is contrasted with too.",
        0,
        0,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_settings(self)
        if self.supcon == "released" and self.supcon_memory:
            raise UsageError(
                f"setting supcon_memory is {self.supcon_memory}",
                "give 0 with supcon=released, which has no memory",
            )

    def loss_terms(self) -> "Recipe":
        """Return the recipe as the loss reads it: for `flat` without terms of the upper levels."""
        if self.model != "flat":
            return self
        supcon = "leaf" if self.supcon == "levels" else self.supcon
        return replace(
            self, hierarchy="ce", coarse_weight=0.0, hba="none", ham="none", supcon=supcon
        )

    @property
    def preset(self) -> str:
        """The preset that this recipe is closest to, by the number of its own values."""

        def shared(name: str) -> int:
            return sum(getattr(self, n) == getattr(PRESETS[name], n) for n in _DIFFERING)

        return max(PRESETS, key=shared)


PRESETS = {
    name: Recipe(**{each.name: each.defaults[column] for each in settings_of(Recipe)})
    for column, name in enumerate(PRESET_NAMES)
}
_DIFFERING = [each.name for each in settings_of(Recipe) if len(set(each.defaults)) > 1]
