"""Hierarchy alignment in plain torch, from attention logits: the documentation."""

import torch
from torch import Tensor

from hmil_fast.kernels.bags import Spans, bag_rows


def alignment_reference(
    coarse: tuple[Tensor, Tensor],
    fine: tuple[Tensor, Tensor],
    parent: Tensor,
    spans: Spans,
    average: bool,
) -> Tensor:
    """`hierarchy_alignment` for (logits, lse) of both levels, in their dtype."""
    rows, bag = bag_rows(spans, parent.device)
    above = _scaled(coarse[0][rows] - coarse[1][bag])
    below = _scaled(fine[0][rows] - fine[1][bag])
    classes = torch.arange(above.shape[1], device=parent.device)
    children = (parent[:, None] == classes).to(below.dtype)  # [Cf, Cc]
    if average:
        children = children / children.sum(0).clamp_min(1)
    summed = below @ children  # [rows, Cc], S up to a factor per instance
    # |u − v|² / 2 = 1 − u·v for unit vectors, without the cancellation near agreement
    apart = (_unit(above) - _unit(summed)).square().sum(1) / 2
    sizes = torch.tensor([max(length, 1) for _, length in spans], dtype=apart.dtype)
    total = apart.new_zeros(len(spans)).index_add(0, bag, apart)
    return total / sizes.to(total.device, non_blocking=True)


def _scaled(log_attention: Tensor) -> Tensor:
    """Attention of each instance, divided by its largest entry: the cosine does not see scale."""
    return torch.exp(log_attention - log_attention.detach().amax(1, keepdim=True))


def _unit(rows: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norm
