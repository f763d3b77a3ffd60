"""Classification losses along the label tree."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hmil_fast.labels import LabelTree


def node_log_p(log_p: Tensor, ancestors: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of the true node of every level, as the sum of its leaves.

    Args:
        log_p: [B, K], log-probabilities of the leaves.
        ancestors: int64 [L, K], the node of every leaf per level.
        targets: int64 [B, L], the true nodes.

    Returns:
        [B, L].
    """
    below = ancestors == targets[:, :, None]  # [B, L, K]
    return torch.logsumexp(log_p[:, None].masked_fill(~below, -torch.inf), dim=2)


def marginal(log_p: Tensor, ancestors: Tensor, targets: Tensor) -> Tensor:
    """NLL of the true nodes, mean over the levels: [B]. Arguments as for `node_log_p`."""
    return -node_log_p(log_p, ancestors, targets).mean(1)


def hxe(log_p: Tensor, ancestors: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Hierarchical cross-entropy: −Σ_l weight · log p(node | parent): [B].

    Bertinetto et al., CVPR 2020. Arguments as for `node_log_p`, and the [L] of `hxe_weights`.
    """
    nodes = node_log_p(log_p, ancestors, targets)
    conditional = nodes.diff(dim=1, prepend=nodes.new_zeros(len(nodes), 1))
    return -(weights.to(nodes.dtype) * conditional).sum(1)


def hxe_weights(tree: LabelTree, alpha: float) -> Tensor:
    """exp(−α · edges from the root to the node) of the levels, float64 [L].

    The paper writes h(C) and calls it height, and says that α discounts information *down* the
    hierarchy, in favour of the generic; the authors' code takes the distance from the root.
    """
    return torch.exp(-alpha * torch.arange(1, tree.num_levels + 1, dtype=torch.float64))


def soft_cross_entropy(log_p: Tensor, leaf: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with soft labels (Bertinetto et al., CVPR 2020): [B].

    Args:
        log_p: [B, K], log-probabilities of the leaves.
        leaf: int64 [B], the true leaves.
        labels: [K, K], of `soft_labels`.
    """
    return -(labels.to(log_p.dtype)[leaf] * log_p).sum(1)


def soft_labels(tree: LabelTree, beta: float) -> Tensor:
    """The target distribution of every leaf, softmax(−β d), float64 [K, K].

    d is the height of the lowest common ancestor over that of the root.
    """
    heights = tree.heights()
    root = heights[0].max() + 1
    common = np.full((len(tree.leaves),) * 2, root)
    for nodes, height in zip(tree.ancestors(), heights, strict=True):
        common = np.where(nodes[:, None] == nodes, height, common)
    return torch.softmax(torch.from_numpy(-beta * common / root), dim=1)


def bag_alignment(fine_logits: Tensor, parent: Tensor, target: Tensor) -> Tensor:
    """HBA: −log Σ softmax(fine)_f over the children f of the true coarse class, mean over bags.

    Args:
        fine_logits: [B, Kf].
        parent: int64 [Kf], the coarse class of each fine class.
        target: int64 [B], the true coarse classes.
    """
    return -node_log_p(F.log_softmax(fine_logits, dim=1), parent[None], target[:, None]).mean()


def bag_alignment_released(
    fine_logits: Tensor, parent: Tensor, target: Tensor, coarse_classes: int
) -> Tensor:
    """HBA as in the authors' code: cross-entropy that takes the summed probabilities for logits.

    The second softmax bounds it: at best log(1 + (Kc − 1)/e), 0.313 for two coarse classes and
    0.551 for three. Arguments as for `bag_alignment`.
    """
    children = parent[:, None] == torch.arange(coarse_classes, device=parent.device)
    summed = torch.softmax(fine_logits, dim=1) @ children.to(fine_logits.dtype)
    return F.cross_entropy(summed, target)
