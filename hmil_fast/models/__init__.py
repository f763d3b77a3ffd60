"""Models: bags of features in, logits per level of the label tree out."""

from typing import TYPE_CHECKING

from hmil_fast.config import MODELS
from hmil_fast.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MODELS", "build_model"]


def build_model(
    name: str,
    dim: int,
    num_classes: tuple[int, ...],
    parents: tuple[tuple[int, ...], ...] = (),
    *,
    hidden: int = 256,
    dropout: float = 0.0,
    readout: str = "paper",
) -> "nn.Module":
    """Make a model by its name; every one is called as ``model(x, bags, targets) -> HmilOutput``.

    Args:
        name: One of `MODELS`.
        dim: Feature dimension D.
        num_classes: Nodes per level of the label tree, coarse first.
        parents: Per level below the first, the parent of each node; flat needs them.
        hidden: Width of the instance embedding.
        dropout: On the gate of a gated attention, while training; nothing to the others.
        readout: Of hmil and flat: "paper", or "evidence"; nothing to the others.

    Raises:
        UsageError: No such model.
    """
    if name == "hmil":
        from hmil_fast.models.hmil import HMIL

        return HMIL(dim, num_classes, hidden=hidden, dropout=dropout, readout=readout)
    if name == "flat":
        from hmil_fast.models.flat import FlatHMIL

        return FlatHMIL(dim, num_classes, parents, hidden=hidden, dropout=dropout, readout=readout)
    if name == "abmil":
        from hmil_fast.models.abmil import ABMIL

        return ABMIL(dim, num_classes, hidden=hidden, dropout=dropout)
    if name == "clam":
        from hmil_fast.models.clam import CLAM

        return CLAM(dim, num_classes, hidden=hidden, dropout=dropout)
    if name == "dsmil":
        from hmil_fast.models.dsmil import DSMIL

        return DSMIL(dim, num_classes, hidden=hidden)
    if name in ("mean", "max"):
        from hmil_fast.models.baselines import MaxPool, MeanPool

        return (MeanPool if name == "mean" else MaxPool)(dim, num_classes, hidden=hidden)
    raise UsageError(f"there is no model {name!r}", f"choose one of {', '.join(MODELS)}")
