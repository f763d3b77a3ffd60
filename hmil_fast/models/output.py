"""HmilOutput, the return value of all models, and sums of probabilities along the label tree."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class HmilOutput(NamedTuple):
    """Predictions for B bags of N instances in all; tuples have one entry per level, coarse first.

    Attributes:
        logits: [B, K_l] per level.
        attention_logits: [N, K_l] per level; the attention of instance i in bag b is
            exp(attention_logits[l][i] − lse[l][b]). Empty for a model without attention, and
            in training for a model whose attentions no loss aligns.
        lse: [B, K_l] per level, −inf for an empty bag. Empty like attention_logits.
        embeddings: [B, K, E], one L2-normalised row per class of the finest level (a row of zeros
            stays zero), or None.
        auxiliary: Scalar that the model adds to the training loss, weighted already; or None.
    """

    logits: tuple[Tensor, ...]
    attention_logits: tuple[Tensor, ...]
    lse: tuple[Tensor, ...]
    embeddings: Tensor | None
    auxiliary: Tensor | None = None


def summed_logits(
    leaf: Tensor, parents: Sequence[Tensor | tuple[int, ...]], *, top: int | None = None
) -> tuple[Tensor, ...]:
    """Compute log-probabilities of every level: a node has the sum of its children's probabilities.

    Args:
        leaf: [B, K], logits of the leaves.
        parents: Per level below the first, the parent of each of its nodes (`LabelTree.parents`).
        top: Number of nodes on the first level; without it `parents` is read, which may wait.

    Returns:
        [B, K_l] per level, coarse first; the last is the log-softmax of `leaf`.
    """
    levels = [torch.log_softmax(leaf, dim=1)]
    counts = [len(parent) for parent in parents[:-1]]
    if parents:
        counts.insert(0, int(max(parents[0])) + 1 if top is None else top)
    for parent, count in zip(reversed(parents), reversed(counts), strict=True):
        above = torch.as_tensor(parent, device=leaf.device)
        levels.append(sum_children(levels[-1], above, count))
    return tuple(reversed(levels))


def sum_children(values: Tensor, parent: Tensor, count: int) -> Tensor:
    """Compute log Σ exp over the children of each node: [B, K] and int64 [K] → [B, count]."""
    # every node has a child, and its largest is shifted to 0, so no sum is below 1
    most = values.new_full((len(values), count), -torch.inf)
    most = most.scatter_reduce(1, parent.expand_as(values), values.detach(), "amax")
    sums = torch.zeros_like(most).index_add(1, parent, (values - most[:, parent]).exp())
    return most + sums.log()
