"""Forward pass of pooling in Triton: a program pools a tile, fused_combine.py adds up tiles.

For narrow rows of half precision the tiles are pooled by fused_resident.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmil_fast.kernels.bags import Spans
from hmil_fast.kernels.gated_attention_pool.configs import Config, Resident
from hmil_fast.kernels.gated_attention_pool.fused_combine import combine
from hmil_fast.kernels.gated_attention_pool.fused_resident import tile_forward_resident
from hmil_fast.kernels.gated_attention_pool.gates import gates, rounded
from hmil_fast.kernels.launch import constants, options
from hmil_fast.kernels.tiles import Tiles


@triton.jit
def tile_forward(
    x, W, b, Wc, bc, table, logits, tile_max, tile_sum, tile_pooled, D, H, C,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, SUM: tl.constexpr, SMALL: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """Logits of one tile, and Σ exp(s − max) and Σ exp(s − max) x of its rows."""
    tile = tl.program_id(0).to(tl.int64)
    first = tl.load(table + 4 * tile)
    r = tl.arange(0, ROWS)
    ok = r < tl.load(table + 4 * tile + 1)
    c = tl.arange(0, CLASSES)
    c_ok = c < C
    x_rows = x + (first + r)[:, None] * D

    s = tl.zeros((ROWS, CLASSES), SUM)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        tanh, sigmoid = gates(
            x_rows, W, b, h, ok, D, H, BLOCK_H, BLOCK_K, SUM, PRECISION, UPCAST, APPROX
        )
        w_c = tl.load(Wc + c[None, :] * H + h[:, None], c_ok[None, :] & (h < H)[:, None], other=0.0)
        gated = rounded(tanh * sigmoid, SMALL, UPCAST)
        w_c = rounded(w_c, SMALL, UPCAST)
        s = tl.dot(gated, w_c, s, input_precision=PRECISION, out_dtype=SUM)
    s += tl.load(bc + c, c_ok, other=0.0)[None, :]
    tl.store(logits + (first + r)[:, None] * C + c[None, :], s, ok[:, None] & c_ok[None, :])

    top = tl.max(tl.where(ok[:, None], s, -float("inf")), 0)
    p = tl.where(ok[:, None], tl.exp(s - top[None, :]), 0.0)
    tl.store(tile_max + tile * C + c, top, c_ok)
    tl.store(tile_sum + tile * C + c, tl.sum(p, 0), c_ok)
    p = rounded(p, x.dtype.element_ty, UPCAST)
    d = tl.arange(0, BLOCK_D)
    for d0 in range(0, D, BLOCK_D):
        d_ok = d0 + d < D
        rows = tl.load(x_rows + (d0 + d)[None, :], ok[:, None] & d_ok[None, :], other=0.0)
        if UPCAST:
            rows = rows.to(SUM)
        # xᵀ p and not pᵀ x: 16 classes are too few rows for the matrix units of sm_90 and later
        part = tl.dot(tl.trans(rows), p, input_precision=PRECISION, out_dtype=SUM)
        at = tile_pooled + (tile * C + c)[None, :] * D + (d0 + d)[:, None]
        tl.store(at, part, d_ok[:, None] & c_ok[None, :])


def launch_forward(
    x: Tensor, weights: list[Tensor], spans: Spans, tiles: Tiles, config: Config | Resident
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled, lse and logits for contiguous x [N, D] and [W [2H, D], b [2H], Wc, bc].

    x and W have one dtype, the others that of the sums. In W the rows of V lie above those of U;
    for `Resident`, which must have been made for D, they take turns.
    """
    W, b, Wc, bc = weights
    (rows, dim), (classes, hidden) = x.shape, Wc.shape
    count = len(tiles.table)
    logits = (b.new_empty if tiles.whole else b.new_zeros)(rows, classes)
    tile_max, tile_sum = b.new_empty(2, count, classes)
    tile_pooled = b.new_empty(count, classes, dim)
    if count:
        kept = isinstance(config, Resident)  # it has D among its constants
        kernel = tile_forward_resident if kept else tile_forward
        with torch.cuda.device_of(x):
            kernel[(count,)](
                x, W, b, Wc, bc, tiles.table, logits, tile_max, tile_sum, tile_pooled,
                *((hidden, classes) if kept else (dim, hidden, classes)),
                **constants(config), **options(config),
            )  # fmt: skip
    return *combine((tile_max, tile_sum, tile_pooled), spans, tiles, config.ROWS), logits
