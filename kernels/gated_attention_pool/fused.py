"""Run the fused pooling kernels: choose a configuration, cut into tiles, launch."""

import torch
from torch import Tensor

from hmil_fast.kernels.bags import Spans
from hmil_fast.kernels.dispatch import exact_products, interpreted
from hmil_fast.kernels.gated_attention_pool.configs import Config, Pass, configuration
from hmil_fast.kernels.gated_attention_pool.fused_backward import Saved, launch_backward
from hmil_fast.kernels.gated_attention_pool.fused_forward import launch_forward
from hmil_fast.kernels.tiles import cut


def forward(x: Tensor, weights: list[Tensor], spans: Spans) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled, lse and logits for weights [W [2, H, D], b [2, H], Wc, bc], all contiguous."""
    x, weights = _prepare(x, weights)
    config = _config("forward", x, len(weights[-1]))
    tiles = cut(spans, len(x), config.ROWS, x.device)
    return launch_forward(x, weights, tiles, config)


def backward(
    x: Tensor,
    weights: list[Tensor],
    results: list[Tensor],
    grads: list[Tensor],
    spans: Spans,
    need_x: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients as `pool_streaming_backward` gives them."""
    rows, prepared = _prepare(x, weights)
    config = _config("backward", rows, len(weights[-1]))
    tiles = cut(spans, len(x), config.ROWS, x.device)
    saved = Saved(*results, *(t.contiguous() for t in grads))
    dx, dW, db, dWc, dbc = launch_backward(rows, prepared, saved, tiles, config, need_x)
    dx = None if dx is None else dx.to(x.dtype)
    return dx, dW.view_as(weights[0]), db.view_as(weights[1]), dWc, dbc


def _prepare(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    W, b, Wc, bc = (t.contiguous() for t in weights)
    x = x.to(b.dtype) if b.dtype == torch.float64 else x
    return x.contiguous(), [W.flatten(0, 1).to(x.dtype), b.flatten(), Wc, bc]


def _config(kind: Pass, x: Tensor, classes: int) -> Config:
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    return configuration(
        kind,
        x.dtype,
        classes,
        10 * major + minor,
        interpreted=interpreted(),
        exact=exact_products(),
    )
