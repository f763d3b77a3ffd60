"""Forward pass of pooling in Triton for narrow rows: a tile is read once and stays on the chip."""

import triton
import triton.language as tl

from hmil_fast.kernels.gated_attention_pool.gates import activations, rounded


@triton.jit
def tile_forward_resident(
    x, W, b, Wc, bc, table, logits, tile_max, tile_sum, tile_pooled, H, C,
    D: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
    UPCAST: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """What `tile_forward` gives, for half-precision x and a power of two D.

    The rows [ROWS, D] serve all hidden units and the pooling. The weights of a hidden unit in V and
    in U are neighbours in a block, so that one product makes both gates. All products are in the
    dtype of x, with sums in float32: gates and p are at most 1, so float16 holds them too.
    """
    tile = tl.program_id(0).to(tl.int64)
    first = tl.load(table + 4 * tile)
    r = tl.arange(0, ROWS)
    ok = r < tl.load(table + 4 * tile + 1)
    c = tl.arange(0, CLASSES)
    c_ok = c < C
    d = tl.arange(0, D)
    rows = tl.load(x + (first + r)[:, None] * D + d[None, :], ok[:, None], other=0.0)
    if UPCAST:
        rows = rows.to(tl.float32)

    s = tl.zeros((ROWS, CLASSES), tl.float32)
    n = tl.arange(0, 2 * BLOCK_H)
    for h0 in range(0, H, BLOCK_H):
        at = 2 * h0 + n
        w = tl.load(W + at[None, :] * D + d[:, None], (at < 2 * H)[None, :], other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
        both = tl.dot(rows, w)
        both += tl.load(b + (n % 2) * H + h0 + n // 2, at < 2 * H, other=0.0)[None, :]
        v, u = tl.split(tl.reshape(both, (ROWS, BLOCK_H, 2)))
        tanh, sigmoid = activations(v, u, APPROX)
        h = h0 + tl.arange(0, BLOCK_H)
        w_c = tl.load(Wc + c[None, :] * H + h[:, None], c_ok[None, :] & (h < H)[:, None], other=0.0)
        gated = rounded(tanh * sigmoid, x.dtype.element_ty, UPCAST)
        s = tl.dot(gated, rounded(w_c, x.dtype.element_ty, UPCAST), s)
    s += tl.load(bc + c, c_ok, other=0.0)[None, :]
    tl.store(logits + (first + r)[:, None] * C + c[None, :], s, ok[:, None] & c_ok[None, :])

    top = tl.max(tl.where(ok[:, None], s, -float("inf")), 0)
    p = tl.where(ok[:, None], tl.exp(s - top[None, :]), 0.0)
    tl.store(tile_max + tile * C + c, top, c_ok)
    tl.store(tile_sum + tile * C + c, tl.sum(p, 0), c_ok)
    # xᵀ p and not pᵀ x: 16 classes are too few rows for the matrix units of sm_90 and later
    part = tl.dot(tl.trans(rows), rounded(p, x.dtype.element_ty, UPCAST))
    tl.store(tile_pooled + (tile * C + c)[None, :] * D + d[:, None], part, c_ok[None, :])
