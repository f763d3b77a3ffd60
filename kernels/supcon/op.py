"""Log-sum-exp of SupCon over the other rows, as a custom op of torch."""

from typing import Any

import torch
from torch import Tensor

from hmil_fast.kernels.dispatch import choose, interpreted
from hmil_fast.kernels.supcon.streaming import lse_streaming, lse_streaming_backward


@torch.library.custom_op("hmil_fast::supcon_lse", mutates_args=())
def supcon_lse(z: Tensor, temperature: float) -> Tensor:
    """Log Σ_{j ≠ i} exp(z_i·z_j/τ) for every row i of z [R, D], float32 or float64; 0 if R is 1."""
    with torch.autocast(z.device.type, enabled=False):
        if _runs_fused(z):
            from hmil_fast.kernels.supcon.fused import lse_fused

            return lse_fused(z, temperature)
        return lse_streaming(z, temperature)


@torch.library.custom_op("hmil_fast::supcon_lse_backward", mutates_args=())
def supcon_lse_backward(grad: Tensor, z: Tensor, lse: Tensor, temperature: float) -> Tensor:
    """The gradient of `supcon_lse` with respect to z."""
    # backward() may be called under autocast
    with torch.autocast(z.device.type, enabled=False):
        if _runs_fused(z):
            from hmil_fast.kernels.supcon.fused import lse_fused_backward

            return lse_fused_backward(grad, z, lse, temperature)
        return lse_streaming_backward(grad, z, lse, temperature)


def _runs_fused(z: Tensor) -> bool:
    return choose(z.device).name == "fused" and (z.dtype == torch.float32 or interpreted())


@supcon_lse.register_fake
def _(z: Tensor, temperature: float) -> Tensor:
    return z.new_empty(z.shape[0])


@supcon_lse_backward.register_fake
def _(grad: Tensor, z: Tensor, lse: Tensor, temperature: float) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    z, ctx.temperature = inputs
    ctx.save_for_backward(z, output)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    z, lse = ctx.saved_tensors
    return supcon_lse_backward(grad, z, lse, ctx.temperature), None


supcon_lse.register_autograd(_gradient, setup_context=_save)
