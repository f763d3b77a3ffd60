"""Supervised contrastive loss over the class-wise embeddings of the finest level."""

from typing import NamedTuple

import torch
from torch import Tensor

from hmil_fast.kernels.supcon import gather_rows, supcon
from hmil_fast.losses.contrastive_memory import Nodes, nodes_of, supcon_with_memory
from hmil_fast.losses.memory import Memory


class Levels(NamedTuple):
    """The levels that are contrasted.

    Attributes:
        ancestors: int64 [L, K], the node of every leaf per level.
        nodes: The same as matrices.
        weights: float64 [L], exp(1/h) over their sum, h = 1 for the leaves and one more per level
            above (HiMulCon, Zhang et al., CVPR 2022).
    """

    ancestors: Tensor
    nodes: Nodes
    weights: Tensor


def contrast_levels(ancestors: Tensor) -> Levels:
    """The levels of a tree from int64 [L, K], the node of every leaf per level, coarse first."""
    heights = torch.arange(len(ancestors), 0, -1, dtype=torch.float64)
    return Levels(ancestors, nodes_of(ancestors), torch.softmax(1 / heights, 0))


def contrastive(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float,
    levels: Levels | None = None,
    memory: Memory | None = None,
    *,
    gather: bool = True,
) -> Tensor:
    """SupCon over the B·K rows of a batch; all rows of a bag carry its leaf label.

    With `levels` it is that of every level, the rows of a bag carrying the bag's node there, in a
    weighted mean.

    Where a process group is set up, B counts the bags of all ranks and every rank gets the same
    value; see `gather_rows` for the gradient. Not so without `gather`.

    Args:
        embeddings: [B, K, E], L2-normalised rows.
        labels: int64 [B], leaf per bag.
        temperature: τ > 0.
        levels: Of `contrast_levels`, on the device.
        memory: Earlier rows that the batch is contrasted with too; needs `levels`. In training
            every rank adds the bags of all ranks to it, of each bag the row of its own class.
        gather: Whether other ranks have other bags.
    """
    if gather:
        embeddings, labels = gather_rows(embeddings, labels)
    rows, leaf = _rows(embeddings, labels)
    if levels is None:
        return supcon(rows, leaf, temperature)
    weights = levels.weights
    if memory is None:
        each = supcon(rows, levels.ancestors[:, leaf].T, temperature)
        return each @ weights.to(each.dtype)
    past = memory.recall(rows)
    value = supcon_with_memory(rows, leaf, past, levels.nodes, weights, temperature)
    if memory.training:
        own = embeddings[torch.arange(len(labels), device=labels.device), labels]
        memory.remember(own.detach(), labels)
    return value


def contrastive_released(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float,
    base: float = 0.1,
    *,
    gather: bool = True,
) -> Tensor:
    """SupCon as in the authors' code: 1e-6 in its denominators, × τ/base, divided by B once more.

    Arguments as for `contrastive`; at the temperature `base` the scale is 1.
    """
    if gather:
        embeddings, labels = gather_rows(embeddings, labels)
    loss = supcon(*_rows(embeddings, labels), temperature, eps=1e-6)
    return loss * (temperature / base / max(len(labels), 1))


def _rows(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return embeddings.flatten(0, 1), labels.repeat_interleave(
        embeddings.shape[1], output_size=embeddings.shape[0] * embeddings.shape[1]
    )
