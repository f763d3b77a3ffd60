"""All-gather of rows over the ranks, with gradients."""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


def gather(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Put the rows of all ranks one after another, in the order of the ranks.

    Every rank then works out the same from all rows. The gradient that comes back to a rank's rows
    is summed over the W ranks, W times that of one process; DistributedDataParallel, which
    averages over ranks, makes it that of one process again.

    Args:
        tensors: [R, ...] each. R may differ between ranks and be 0, the other dimensions, the
            dtypes and what requires a gradient not.

    Returns:
        [ΣR, ...] each; the tensors as given where no process group of more than one rank is set up.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensors
    if distributed.get_world_size() == 1:
        return tensors
    # from host to host where the group can: the sizes would else have to wait for the device
    host = "cpu:" in distributed.get_backend_config()
    own = torch.tensor([tensors[0].shape[0]], device="cpu" if host else tensors[0].device)
    counts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, own)
    sizes = torch.cat(counts).tolist()
    return tuple(_Gather.apply(tensor, sizes) for tensor in tensors)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, sizes: list[int]) -> Tensor:
        before = sum(sizes[: distributed.get_rank()])
        ctx.own = slice(before, before + z.shape[0])
        # a collective wants the same shape everywhere
        padded = z.new_zeros(max(sizes), *z.shape[1:])
        padded[: len(z)] = z.detach()
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(grad)
        return grad[ctx.own], None
