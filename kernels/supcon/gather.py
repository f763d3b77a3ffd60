"""Rows of all ranks as one tensor, differentiable."""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


def gather_rows(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Put the rows and labels of all ranks one after another, in the order of the ranks.

    Every rank then works out the same loss over all rows. The gradient that comes back to a
    rank's rows is summed over the W ranks, W times that of one process; DistributedDataParallel,
    which averages over ranks, makes it that of one process again.

    Args:
        z: [R, ...]; R may differ between ranks and be 0, the other dimensions and the dtype not.
        labels: int64, one row per row of z.

    Returns:
        z [ΣR, ...] and labels of all ranks; both as given where no process group of more than one
        rank is set up.

    Raises:
        ValueError: labels has not as many rows as z.
    """
    if labels.shape[0] != z.shape[0]:
        raise ValueError(
            f"labels has {labels.shape[0]} rows, z {z.shape[0]}; give one label per row"
        )
    if not (distributed.is_available() and distributed.is_initialized()):
        return z, labels
    if distributed.get_world_size() == 1:
        return z, labels
    counts = [
        torch.empty(1, dtype=torch.int64, device=z.device)
        for _ in range(distributed.get_world_size())
    ]
    distributed.all_gather(counts, torch.tensor([z.shape[0]], device=z.device))
    sizes = [int(count) for count in torch.cat(counts).tolist()]
    rows: Tensor = _Gather.apply(z, sizes)
    return rows, _concatenated(labels, sizes)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, sizes: list[int]) -> Tensor:
        before = sum(sizes[: distributed.get_rank()])
        ctx.own = slice(before, before + z.shape[0])
        return _concatenated(z, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(grad)
        return grad[ctx.own], None


def _concatenated(rows: Tensor, sizes: list[int]) -> Tensor:
    # a collective wants the same shape everywhere
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
