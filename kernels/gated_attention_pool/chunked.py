"""Pool one bag in parts that are never in memory together: chunks of a file, shards of ranks."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    random: bool = False,
    sharded: bool = False,
) -> Pooled:
    """Pool one bag chunk by chunk, exactly, with exact gradients.

    Every chunk gives its pooled and lse, `merge` makes them those of the bag, and autograd goes
    through that. Of a chunk nothing else is kept but its logits; the backward pass asks for every
    chunk once more and pools it again. So one chunk and what is worked out from it are in memory
    at a time, beside 4·C bytes an instance and, in the backward pass, as much for their gradient.

    Args:
        chunks: The bag, at least one chunk. ``chunks[k]`` reads chunk k, which may be empty, and
            gives the same every time.
        pool: Called as ``pool(chunks[k], *operands)``; pools a chunk as one bag and returns pooled
            [1, C, D], lse [1, C] and logits [n_k, C] as `gated_attention_pool` does. It runs under
            the autocast of the caller.
        operands: All tensors that want a gradient, on the device where the pooling happens.
        random: `pool` draws random numbers (dropout); every chunk then has a seed, itself drawn.
        sharded: The chunks are this rank's part of a bag that lies over all ranks of the process
            group, in their order. A rank may hold none of it (one empty chunk), but every rank
            must call, and go backward. If every rank then takes the same loss from the results,
            a parameter's gradient in one process is the *mean* over ranks of its gradients:
            DistributedDataParallel averages; divide a sum of your own by the number of ranks.

    Returns:
        pooled [1, C, D], lse [1, C] and logits [N, C] of the whole bag, on every rank alike.
        Differentiable once.

    Raises:
        ValueError: In the backward pass, a chunk has not as many rows as before.
    """
    device = operands[0].device
    enabled = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type)
    seed = int(torch.randint(2**62, ())) if random else 0

    def part(k: int, operands: Sequence[Tensor]) -> Pooled:
        """Chunk k, the same in both passes."""
        # a weight cast without gradient is not to be remembered for other uses
        with (
            torch.autocast(device.type, dtype, enabled, cache_enabled=False),
            torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=random),
        ):
            if random:
                torch.manual_seed(seed + k)
            return pool(chunks[k], *operands)

    pooled, lse, logits = _Parts.apply(part, len(chunks), *operands)
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


class _Parts(torch.autograd.Function):
    """Pooled [P, C, D], lse [P, C] and logits [N, C] of P parts.

    One node, and tensors of the final size: results of each chunk kept between its temporaries
    would leave the heap in pieces too small for those of the next, some 250 bytes an instance.
    """

    @staticmethod
    def forward(
        ctx: Any,
        part: Callable[[int, Sequence[Tensor]], Pooled],
        count: int,
        *operands: Tensor,
    ) -> Pooled:
        ctx.part, ctx.sizes = part, []
        ctx.save_for_backward(*operands)
        done = 0
        for k in range(count):
            one = part(k, operands)
            size, classes = one[2].shape
            if not k:
                pooled, lse = (t.new_empty(count, *t.shape[1:]) for t in one[:2])
                logits = one[2].new_empty(count * size, classes)  # memory that is written counts
            if done + size > len(logits):
                logits.resize_(2 * (done + size), classes)
            pooled[k], lse[k], logits[done : done + size] = one[0][0], one[1][0], one[2]
            ctx.sizes.append(size)
            done += size
        return pooled, lse, logits.resize_(done, classes)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_pooled: Tensor, d_lse: Tensor, d_logits: Tensor
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        leaves = [
            t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, needs, strict=True)
        ]
        sums = [torch.zeros_like(t) for t in leaves if t.requires_grad]
        done = 0
        for k, size in enumerate(ctx.sizes):
            with torch.enable_grad():
                found = ctx.part(k, leaves)
            if len(found[2]) != size:
                raise ValueError(
                    f"chunk {k} had {size} rows and now has {len(found[2])}; give the same twice"
                )
            grads = d_pooled[k, None], d_lse[k, None], d_logits[done : done + size]
            _add_gradients(sums, leaves, found, grads)
            done += size
        ordered = iter(sums)
        return None, None, *(next(ordered) if need else None for need in needs)


def _add_gradients(
    sums: list[Tensor], leaves: list[Tensor], found: Pooled, grads: Sequence[Tensor]
) -> None:
    pairs = [(f, g) for f, g in zip(found, grads, strict=True) if f.requires_grad]
    wanted = [t for t in leaves if t.requires_grad]
    if pairs:
        outputs, weights = zip(*pairs, strict=True)
        found_grads = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
        for total, gradient in zip(sums, found_grads, strict=True):
            if gradient is not None:
                total.add_(gradient)
