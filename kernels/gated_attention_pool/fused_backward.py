"""Backward pass of pooling in Triton: recomputes the gates; cuBLAS makes weight gradients."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmil_fast.kernels.gated_attention_pool.configs import Config
from hmil_fast.kernels.gated_attention_pool.gates import gates, rounded
from hmil_fast.kernels.launch import constants, options
from hmil_fast.kernels.tiles import Tiles


# the number of a tile must not make Triton compile the kernel again
@triton.jit(do_not_specialize=["before"])
def tile_backward(
    x, W, b, Wc, table, logits, lse, d_pooled, shift, d_logits, d_gates, d_x, part_b, part_Wc,
    part_bc, before, D, H, C,
    NEED_X: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, SUM: tl.constexpr, SMALL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """One tile: gradients of V x + bv and U x + bu [rows, 2H], and sums over its rows.

    The chunk begins with the tile of the number `before`.
    """
    tile = before + tl.program_id(0).to(tl.int64)
    first = tl.load(table + 4 * tile)
    bag = tl.load(table + 4 * tile + 2)
    packed = tl.load(table + 4 * tile + 3)
    packed -= tl.load(table + 4 * before.to(tl.int64) + 3)  # row within the chunk
    r = tl.arange(0, ROWS)
    ok = r < tl.load(table + 4 * tile + 1)
    c = tl.arange(0, CLASSES)
    c_ok = c < C
    inside = ok[:, None] & c_ok[None, :]
    x_rows = x + (first + r)[:, None] * D

    at = (first + r)[:, None] * C + c[None, :]
    s = tl.load(logits + at, inside, other=0.0)
    p = tl.exp(s - tl.load(lse + bag * C + c, c_ok, other=0.0)[None, :])
    p = tl.where(inside, p, 0.0)
    p_small = rounded(p, SMALL, UPCAST)
    dp = tl.zeros((ROWS, CLASSES), SUM)
    d = tl.arange(0, BLOCK_D)
    for d0 in range(0, D, BLOCK_D):
        d_ok = d0 + d < D
        rows = tl.load(x_rows + (d0 + d)[None, :], ok[:, None] & d_ok[None, :], other=0.0)
        dm = tl.load(
            d_pooled + (bag * C + c)[None, :] * D + (d0 + d)[:, None],
            d_ok[:, None] & c_ok[None, :],
            other=0.0,
        )
        dm = rounded(dm, SMALL, UPCAST)
        dp = tl.dot(rounded(rows, SMALL, UPCAST), dm, dp, input_precision=PRECISION, out_dtype=SUM)
        if NEED_X:
            direct = tl.dot(p_small, tl.trans(dm), input_precision=PRECISION, out_dtype=SUM)
            to = d_x + (packed + r)[:, None] * D + (d0 + d)[None, :]
            tl.store(to, direct.to(d_x.dtype.element_ty), ok[:, None] & d_ok[None, :])
    ds = p * (dp + tl.load(shift + bag * C + c, c_ok, other=0.0)[None, :])
    ds = tl.where(inside, ds + tl.load(d_logits + at, inside, other=0.0), 0.0)
    tl.store(part_bc + tile * C + c, tl.sum(ds, 0), c_ok)
    ds = rounded(ds, SMALL, UPCAST)

    to = d_gates + (packed + r)[:, None] * (2 * H)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        h_ok = h < H
        t, g = gates(x_rows, W, b, h, ok, D, H, BLOCK_H, BLOCK_K, SUM, PRECISION, UPCAST, APPROX)
        w_c = tl.load(Wc + c[:, None] * H + h[None, :], c_ok[:, None] & h_ok[None, :], other=0.0)
        dg = tl.dot(ds, rounded(w_c, SMALL, UPCAST), input_precision=PRECISION, out_dtype=SUM)
        gated = t * g
        # (1 − t²) σ = σ − t (t σ) and t σ (1 − σ) = t σ − (t σ) σ
        dv = dg * (g - t * gated)
        du = dg * (gated - gated * g)
        stored = ok[:, None] & h_ok[None, :]
        tl.store(to + h[None, :], dv.to(d_gates.dtype.element_ty), stored)
        tl.store(to + H + h[None, :], du.to(d_gates.dtype.element_ty), stored)
        tl.store(part_b + tile * 2 * H + h, tl.sum(dv, 0), h_ok)
        tl.store(part_b + tile * 2 * H + H + h, tl.sum(du, 0), h_ok)
        gated = rounded(gated, SMALL, UPCAST)
        dw = tl.dot(tl.trans(gated), ds, input_precision=PRECISION, out_dtype=SUM)
        to_w = part_Wc + (tile * C + c)[None, :] * H + h[:, None]
        tl.store(to_w, dw, h_ok[:, None] & c_ok[None, :])


class Saved(NamedTuple):
    """The results of the forward pass and their gradients, all contiguous."""

    pooled: Tensor
    lse: Tensor
    logits: Tensor
    d_pooled: Tensor
    d_lse: Tensor
    d_logits: Tensor


def launch_backward(
    x: Tensor, weights: list[Tensor], saved: Saved, tiles: Tiles, config: Config, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, W [2H, D], b, Wc and bc for the operands of `launch_forward`."""
    W, b, Wc, _ = weights
    (classes, hidden), dim = Wc.shape, x.shape[1]
    # the gradients of one instance among many are too small for float16
    dtype = b.dtype if x.dtype == torch.float16 else x.dtype
    dx = (torch.empty_like if tiles.whole else torch.zeros_like)(x) if need_x else None
    # rounded alike in dp and in shift, so that the gradients of a bag's logits still add up to 0
    d_pooled = saved.d_pooled.to(dtype)
    shift = saved.d_lse - (d_pooled * saved.pooled).sum(2)
    longest = max((chunk.rows for chunk in tiles.chunks), default=0)
    d_gates = x.new_empty(longest, 2 * hidden, dtype=dtype)
    count = len(tiles.table)
    part_b = b.new_empty(count, 2 * hidden)
    part_Wc = b.new_empty(count, classes, hidden)
    part_bc = b.new_empty(count, classes)
    dW = None
    to_rows = W.to(dtype) if need_x else W
    done = 0
    for chunk in tiles.chunks:
        in_place = dx is not None and dx.dtype == dtype and isinstance(chunk.where, slice)
        if dx is None:
            d_rows = d_gates  # written by nobody
        else:
            d_rows = dx[chunk.where] if in_place else x.new_empty(chunk.rows, dim, dtype=dtype)
        with torch.cuda.device_of(x):
            tile_backward[(len(chunk.table),)](
                x, W, b, Wc, tiles.table, saved.logits, saved.lse, d_pooled, shift,
                saved.d_logits, d_gates, d_rows, part_b, part_Wc, part_bc, done,
                dim, hidden, classes, need_x, **constants(config), **options(config),
            )  # fmt: skip
        done += len(chunk.table)
        grad = d_gates[: chunk.rows]
        product = _product(grad.T, x[chunk.where].to(dtype), b.dtype)
        dW = product if dW is None else dW.add_(product)
        if dx is not None:
            d_rows.addmm_(grad, to_rows)
            if not in_place:
                dx[chunk.where] = d_rows.to(dx.dtype)
    if dW is None:
        dW = torch.zeros_like(W, dtype=b.dtype)
    return dx, dW, part_b.sum(0), part_Wc.sum(0), part_bc.sum(0)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The product with sums in `dtype`."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
