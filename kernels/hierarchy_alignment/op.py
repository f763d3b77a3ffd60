"""Hierarchy alignment as a custom op of torch, which chooses fused or streaming."""

from typing import Any

import torch
from torch import Tensor

from hmil_fast.kernels.bags import Spans, check_bags
from hmil_fast.kernels.dispatch import choose, interpreted
from hmil_fast.kernels.hierarchy_alignment.streaming import (
    alignment_streaming,
    alignment_streaming_backward,
)
from hmil_fast.kernels.tiles import overlap

_MAX_CLASSES = 32  # of a level; more would not fit the registers of the fused kernels

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("hmil_fast::hierarchy_alignment", mutates_args=())
def alignment(
    coarse_logits: Tensor,
    coarse_lse: Tensor,
    fine_logits: Tensor,
    fine_lse: Tensor,
    parent: Tensor,
    bags: Tensor,
    average: bool,
) -> Tensor:
    """`hierarchy_alignment` for operands of one dtype, float32 or float64."""
    spans = check_bags(bags, coarse_logits.shape[0])
    _check_parent(parent, coarse_logits.shape[1])
    coarse, fine = (coarse_logits, coarse_lse), (fine_logits, fine_lse)
    with torch.autocast(coarse_logits.device.type, enabled=False):
        if _runs_fused(coarse_logits, fine_logits, spans):
            from hmil_fast.kernels.hierarchy_alignment.fused import alignment_fused

            return alignment_fused(coarse, fine, parent, spans, average)
        return alignment_streaming(coarse, fine, parent, spans, average)


@torch.library.custom_op("hmil_fast::hierarchy_alignment_backward", mutates_args=())
def alignment_backward(
    grad: Tensor,
    coarse_logits: Tensor,
    coarse_lse: Tensor,
    fine_logits: Tensor,
    fine_lse: Tensor,
    parent: Tensor,
    bags: Tensor,
    average: bool,
) -> Gradients:
    """Gradients with respect to the logits and lse, in the order of the arguments."""
    spans = check_bags(bags, coarse_logits.shape[0])
    coarse, fine = (coarse_logits, coarse_lse), (fine_logits, fine_lse)
    # backward() may be called under autocast
    with torch.autocast(grad.device.type, enabled=False):
        if _runs_fused(coarse_logits, fine_logits, spans):
            from hmil_fast.kernels.hierarchy_alignment.fused import alignment_fused_backward

            return alignment_fused_backward(grad, coarse, fine, parent, spans, average)
        return alignment_streaming_backward(grad, coarse, fine, parent, spans, average)


def _runs_fused(coarse: Tensor, fine: Tensor, spans: Spans) -> bool:
    return (
        choose(coarse.device).name == "fused"
        and (coarse.dtype == torch.float32 or interpreted())
        and all(0 < level.shape[1] <= _MAX_CLASSES for level in (coarse, fine))
        and not overlap(spans)
    )


def _check_parent(parent: Tensor, classes: int) -> None:
    # looking at values on an accelerator would make the host wait
    if parent.device.type == "cpu" and not all(0 <= p < classes for p in parent.tolist()):
        raise ValueError(
            f"parent is {parent.tolist()}; give coarse classes from 0 to {classes - 1}"
        )


@alignment.register_fake
def _(coarse_logits: Tensor, coarse_lse: Tensor, *_: Any) -> Tensor:
    return coarse_lse.new_empty(coarse_lse.shape[0])


@alignment_backward.register_fake
def _(grad: Tensor, *operands: Any) -> Gradients:
    a, b, c, d = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in operands[:4])
    return a, b, c, d


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.average = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = alignment_backward(grad, *ctx.saved_tensors, ctx.average)
    return *found, None, None, None


alignment.register_autograd(_gradients, setup_context=_save)
