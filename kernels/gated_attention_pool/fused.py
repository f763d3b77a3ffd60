"""Run the fused pooling kernels: choose a configuration, cut into tiles, launch."""

import torch
from torch import Tensor

from hmil_fast.kernels.bags import Spans
from hmil_fast.kernels.dispatch import exact_products, interpreted
from hmil_fast.kernels.gated_attention_pool.configs import Config, Pass, configuration, resident
from hmil_fast.kernels.gated_attention_pool.fused_backward import Saved, launch_backward
from hmil_fast.kernels.gated_attention_pool.fused_forward import launch_forward
from hmil_fast.kernels.tiles import cut


def forward(x: Tensor, weights: list[Tensor], spans: Spans) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled, lse and logits for weights [W [2, H, D], b [2, H], Wc, bc], all contiguous."""
    x, classes = _rows(x, weights), len(weights[-1])
    kept = resident(x.dtype, x.shape[1], classes, _arch(x), interpreted=interpreted())
    config = kept or _config("forward", x, classes)
    weights = _weights(weights, x.dtype, pairs=kept is not None)
    tiles = cut(spans, len(x), config.ROWS, x.device)
    return launch_forward(x, weights, spans, tiles, config)


def backward(
    x: Tensor,
    weights: list[Tensor],
    results: list[Tensor],
    grads: list[Tensor],
    spans: Spans,
    need_x: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients as `pool_streaming_backward` gives them."""
    rows = _rows(x, weights)
    prepared = _weights(weights, rows.dtype, pairs=False)
    config = _config("backward", rows, len(weights[-1]))
    tiles = cut(spans, len(x), config.ROWS, x.device)
    saved = Saved(*results, *(t.contiguous() for t in grads))
    dx, dW, db, dWc, dbc = launch_backward(rows, prepared, saved, tiles, config, need_x)
    dx = None if dx is None else dx.to(x.dtype)
    return dx, dW.view_as(weights[0]), db.view_as(weights[1]), dWc, dbc


def _rows(x: Tensor, weights: list[Tensor]) -> Tensor:
    sums = weights[1].dtype
    return (x.to(sums) if sums == torch.float64 else x).contiguous()


def _weights(weights: list[Tensor], dtype: torch.dtype, pairs: bool) -> list[Tensor]:
    """W [2H, D] in `dtype`, V above U or, for pairs, their rows by turns; b [2H], Wc and bc."""
    W, b, Wc, bc = weights
    W = (W.transpose(0, 1) if pairs else W).to(dtype, memory_format=torch.contiguous_format)
    return [W.contiguous().flatten(0, 1), b.flatten(), Wc.contiguous(), bc.contiguous()]


def _arch(x: Tensor) -> int:
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    return 10 * major + minor


def _config(kind: Pass, x: Tensor, classes: int) -> Config:
    return configuration(
        kind,
        x.dtype,
        classes,
        _arch(x),
        interpreted=interpreted(),
        exact=exact_products(),
    )
