"""Gated attention pooling as a custom op of torch, which chooses fused or streaming."""

from typing import Any, cast

import torch
from torch import Tensor

from hmil_fast.kernels.bags import Spans, check_bags
from hmil_fast.kernels.dispatch import choose, interpreted
from hmil_fast.kernels.gated_attention_pool import streaming
from hmil_fast.kernels.tiles import overlap

MAX_CLASSES = 32  # more would not fit the registers of the fused kernels

_Three = tuple[Tensor, Tensor, Tensor]
_Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def runs_fused(x: Tensor, Wc: Tensor, spans: Spans) -> bool:
    """Whether the fused kernels serve these operands.

    Not if a row is in two bags, there are over 32 classes, or the sums are in float64.
    """
    return (
        choose(x.device).name == "fused"
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and (Wc.dtype == torch.float32 or interpreted())
        and 0 < len(Wc) <= MAX_CLASSES
        and min(x.shape[1], Wc.shape[1]) > 0
        and not overlap(spans)
    )


@torch.library.custom_op("hmil_fast::gated_attention_pool", mutates_args=())
def pool(x: Tensor, W: Tensor, b: Tensor, Wc: Tensor, bc: Tensor, bags: Tensor) -> _Three:
    """Pooled, lse and logits of `gated_attention_pool`.

    W [2, H, D] is V and U, b [2, H] their biases. x has any float dtype, the weights that of the
    sums, float32 or float64. `bags` is read on the CPU; on a GPU that waits for it.
    """
    spans = check_bags(bags, len(x))
    with torch.autocast(x.device.type, enabled=False):
        if runs_fused(x, Wc, spans):
            from hmil_fast.kernels.gated_attention_pool import fused

            return fused.forward(x, [W, b, Wc, bc], spans)
        (V, U), (bv, bu) = W, b
        return streaming.pool_streaming(x, [V, bv, U, bu, Wc, bc], spans)


@torch.library.custom_op("hmil_fast::gated_attention_pool_backward", mutates_args=())
def pool_backward(  # noqa: PLR0913, PLR0917 - operands, results, their gradients
    x: Tensor,
    W: Tensor,
    b: Tensor,
    Wc: Tensor,
    bc: Tensor,
    bags: Tensor,
    results: list[Tensor],
    grads: list[Tensor],
    need_x: bool,
) -> _Five:
    """Gradients of x (of no elements unless wanted), W, b, Wc and bc."""
    spans = check_bags(bags, len(x))
    # backward() may be called under autocast
    with torch.autocast(x.device.type, enabled=False):
        backward = streaming.pool_streaming_backward
        if runs_fused(x, Wc, spans):
            from hmil_fast.kernels.gated_attention_pool import fused

            backward = fused.backward
        dx, *others = backward(x, [W, b, Wc, bc], results, grads, spans, need_x)
    return cast("_Five", (x.new_empty(0) if dx is None else dx, *others))


@pool.register_fake
def _(x: Tensor, W: Tensor, b: Tensor, Wc: Tensor, bc: Tensor, bags: Tensor) -> _Three:
    classes = Wc.shape[0]
    return (
        bc.new_empty(bags.shape[0], classes, x.shape[1]),
        bc.new_empty(bags.shape[0], classes),
        bc.new_empty(x.shape[0], classes),
    )


@pool_backward.register_fake
def _(  # noqa: PLR0913, PLR0917
    x: Tensor,
    W: Tensor,
    b: Tensor,
    Wc: Tensor,
    bc: Tensor,
    bags: Tensor,
    results: list[Tensor],
    grads: list[Tensor],
    need_x: bool,
) -> _Five:
    dx = x.new_empty(x.shape if need_x else 0)
    return cast("_Five", (dx, *(t.new_empty(t.shape) for t in (W, b, Wc, bc))))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: _Three) -> None:
    pooled, lse, logits = output
    ctx.save_for_backward(*inputs, pooled, lse, logits)


def _gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *operands, pooled, lse, logits = ctx.saved_tensors
    need_x = ctx.needs_input_grad[0]
    dx, *others = pool_backward(*operands, [pooled, lse, logits], list(grads), need_x)
    return (dx if need_x else None, *others, None)


pool.register_autograd(_gradient, setup_context=_save)
