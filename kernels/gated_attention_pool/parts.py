"""One bag pooled in parts that are never in memory together: chunks of a file, shards of ranks."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hmil_fast.kernels.gather import gather

Pooled = tuple[Tensor, Tensor, Tensor]


class Chunks(Protocol):
    """A list of tensors, or what reads one when it is asked for it."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int, /) -> Tensor: ...


def pool_in_parts(
    chunks: Chunks,
    pool: Callable[..., Pooled],
    operands: Sequence[Tensor],
    *,
    sharded: bool = False,
) -> Pooled:
    """Pool one bag chunk by chunk, exactly, with exact gradients.

    Every chunk gives its pooled and lse, `merge` makes them those of the bag, and autograd goes
    through that. Of a chunk nothing is kept but its logits; the backward pass asks for every chunk
    once more (dropout drops the same). So one chunk and what is worked out from it are in memory
    at a time, beside 4·C bytes an instance and, in the backward pass, as much for their gradient.

    Args:
        chunks: The bag, at least one chunk. ``chunks[k]`` reads chunk k, which may be empty, and
            gives the same every time.
        pool: Called as ``pool(chunks[k], *operands)``; pools a chunk as one bag and returns pooled
            [1, C, D], lse [1, C] and logits [n_k, C] as `gated_attention_pool` does. It runs under
            the autocast of the caller.
        operands: Tensors with which to pool, on the device where that happens.
        sharded: The chunks are this rank's part of a bag that lies over all ranks of the process
            group, in their order. A rank may hold none of it (one empty chunk), but every rank
            must call, and go backward. If every rank then takes the same loss from the results,
            a parameter's gradient in one process is the *mean* over ranks of its gradients:
            DistributedDataParallel averages; divide a sum of your own by the number of ranks.

    Returns:
        pooled [1, C, D], lse [1, C] and logits [N, C] of the whole bag, on every rank alike.
    """

    def part(k: int, *operands: Tensor) -> Pooled:
        return pool(chunks[k], *operands)

    parts = [checkpoint(part, k, *operands, use_reentrant=False) for k in range(len(chunks))]
    pooled, lse, logits = (torch.cat(column) for column in zip(*parts, strict=True))
    del parts
    pooled, lse = merge(pooled, lse)
    if sharded:
        pooled, lse = merge(*gather(pooled, lse))
        (logits,) = gather(logits)
    return pooled, lse, logits


def merge(pooled: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled and lse of a bag from those of its parts; differentiable, and ordered.

    Args:
        pooled: [P, C, D]; 0 for an empty part.
        lse: [P, C]; −inf for an empty part.

    Returns:
        pooled [1, C, D] and lse [1, C]; 0 and −inf if all parts are empty.
    """
    top = lse.detach().amax(0, keepdim=True)
    weight = torch.exp(lse - torch.where(top == -torch.inf, 0, top))
    total = weight.sum(0, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1, total)
    merged = ((weight / total)[:, :, None] * pooled).sum(0, keepdim=True)
    return merged, torch.where(empty, -torch.inf, top + torch.log(total))
