"""Models: bags of features in, logits per level of the label tree out."""

from typing import TYPE_CHECKING, Any

from hmil_fast.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

MODELS = ("hmil", "mean")


def build_model(name: str, dim: int, num_classes: tuple[int, ...], **options: Any) -> "nn.Module":
    """Make a model by its name; every model is called as ``model(x, bags) -> HmilOutput``.

    Args:
        name: One of `MODELS`.
        dim: Feature dimension D.
        num_classes: Nodes per level of the label tree, coarse first.
        options: Settings of that model (``hidden``; ``dropout`` for hmil).

    Raises:
        UsageError: No such model.
    """
    if name == "hmil":
        from hmil_fast.models.hmil import HMIL

        return HMIL(dim, num_classes, **options)
    if name == "mean":
        from hmil_fast.models.baselines import MeanPool

        return MeanPool(dim, num_classes, **options)
    raise UsageError(f"there is no model {name!r}", f"choose one of {', '.join(MODELS)}")
