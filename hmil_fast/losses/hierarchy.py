"""Classification losses along the label tree, from logits per level."""

import torch
from torch import Tensor
from torch.nn import functional as F


def level_cross_entropy(logits: tuple[Tensor, ...], targets: Tensor) -> list[Tensor]:
    """Cross-entropy of every level, mean over bags.

    Args:
        logits: [B, K_l] per level, coarse first.
        targets: int64 [B, L], the node of each bag per level.
    """
    return [F.cross_entropy(level, targets[:, l]) for l, level in enumerate(logits)]


def bag_alignment(fine_logits: Tensor, children: Tensor, target: Tensor) -> Tensor:
    """HBA: −log Σ softmax(fine)_f over the children f of the true coarse class, mean over bags.

    Args:
        fine_logits: [B, Kf].
        children: bool [Kc, Kf], whether f is a child of c.
        target: int64 [B], the true coarse classes.
    """
    log_p = F.log_softmax(fine_logits, dim=1)
    return -torch.logsumexp(log_p.masked_fill(~children[target], -torch.inf), dim=1).mean()


def bag_alignment_released(fine_logits: Tensor, children: Tensor, target: Tensor) -> Tensor:
    """HBA as in the authors' code: cross-entropy that takes the summed probabilities for logits.

    The second softmax bounds it: at best log(1 + (Kc − 1)/e), 0.313 for two coarse classes and
    0.551 for three. Arguments as for `bag_alignment`.
    """
    summed = torch.softmax(fine_logits, dim=1) @ children.T.to(fine_logits.dtype)
    return F.cross_entropy(summed, target)
