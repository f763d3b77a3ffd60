"""Supervised contrastive loss over the class-wise embeddings of the finest level."""

import math

import torch
from torch import Tensor

from hmil_fast.kernels.supcon import gather_rows, supcon
from hmil_fast.kernels.supcon.op import supcon_lse
from hmil_fast.losses.memory import Memory


def contrastive(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float,
    ancestors: Tensor | None = None,
    memory: Memory | None = None,
    *,
    gather: bool = True,
) -> Tensor:
    """SupCon over the B·K rows of a batch; all rows of a bag carry its leaf label.

    With `ancestors` it is that of every level, the rows of a bag carrying the bag's node there, in
    a weighted mean: levels weigh exp(1/h), h = 1 for the leaves and one more per level above
    (HiMulCon, Zhang et al., CVPR 2022), over the sum of these.

    Where a process group is set up, B counts the bags of all ranks and every rank gets the same
    value; see `gather_rows` for the gradient. Not so without `gather`.

    Args:
        embeddings: [B, K, E], L2-normalised rows.
        labels: int64 [B], leaf per bag.
        temperature: τ > 0.
        ancestors: int64 [L, K], the node of every leaf per level.
        memory: Earlier rows that the batch is contrasted with too; needs `ancestors`. In training
            every rank adds the bags of all ranks to it, of each bag the row of its own class.
        gather: Whether other ranks have other bags.
    """
    if gather:
        embeddings, labels = gather_rows(embeddings, labels)
    rows, leaf = _rows(embeddings, labels)
    if ancestors is None:
        return supcon(rows, leaf, temperature)
    if memory is None:
        levels = supcon(rows, ancestors[:, leaf].T, temperature)
    else:
        levels = _supcon_with(memory, rows, leaf, ancestors, temperature)
        if memory.training:
            own = embeddings[torch.arange(len(labels), device=labels.device), labels]
            memory.remember(own.detach(), labels)
    weights = [math.exp(1 / h) for h in range(len(ancestors), 0, -1)]
    return sum(
        (w / sum(weights) * level for w, level in zip(weights, levels.unbind(), strict=True)),
        start=levels.new_zeros(()),
    )


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


def _supcon_with(
    memory: Memory, z: Tensor, leaf: Tensor, ancestors: Tensor, temperature: float
) -> Tensor:
    """SupCon of every level with the rows z as anchors, against each other and a memory: [L].

    Args:
        memory: Its rows have no gradient and are no anchors.
        z: [R, E].
        leaf: int64 [R].
        ancestors: int64 [L, K], the node of every leaf per level.
        temperature: τ.
    """
    past = memory.recall(z)
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        rows = past.rows.to(z.dtype)
        lowest = torch.finfo(z.dtype).min  # not −inf: an empty memory must not make NaN gradients
        apart = (z @ rows.T / temperature).masked_fill(~past.filled, lowest)
        log_sum = torch.logsumexp(apart, 1)
        if len(z) > 1:
            log_sum = torch.logaddexp(log_sum, supcon_lse(z, temperature))
        levels = []
        nodes = torch.arange(ancestors.shape[1], device=z.device)
        for node in ancestors:
            own = (node[leaf, None] == nodes).to(z.dtype)  # [R, K]
            others = ((node[past.leaf, None] == nodes) & past.filled[:, None]).to(z.dtype)
            positives = own @ (own.sum(0) + others.sum(0)) - 1
            # Σ over the positives of z_i·z_p, from the sums of the rows of each node
            pull = (z * (own @ (own.T @ z + others.T @ rows) - z)).sum(1)
            anchor = positives > 0
            each = log_sum - pull / (temperature * positives.clamp_min(1))
            levels.append(torch.where(anchor, each, 0).sum() / anchor.sum().clamp_min(1))
    return torch.stack(levels)
