"""The gates tanh(Vx + b) and sigmoid(Ux + b) in Triton, for the forward and the backward kernel."""

import triton
import triton.language as tl


@triton.jit
def gates(
    x_rows, W, b, h, ok, D, H,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """tanh(V x + bv) and σ(U x + bu) [rows, BLOCK_H] of the hidden units h; W [2H, D] is V, U."""
    h_ok = h < H
    k = tl.arange(0, BLOCK_K)
    v = tl.zeros((ok.shape[0], BLOCK_H), SUM)
    u = tl.zeros((ok.shape[0], BLOCK_H), SUM)
    for first in range(0, D, BLOCK_K):
        k_ok = first + k < D
        rows = tl.load(x_rows + (first + k)[None, :], ok[:, None] & k_ok[None, :], other=0.0)
        at = W + h[None, :] * D + (first + k)[:, None]
        w_v = tl.load(at, k_ok[:, None] & h_ok[None, :], other=0.0)
        w_u = tl.load(at + H * D, k_ok[:, None] & h_ok[None, :], other=0.0)
        if UPCAST:
            rows, w_v, w_u = rows.to(SUM), w_v.to(SUM), w_u.to(SUM)
        v = tl.dot(rows, w_v, v, input_precision=PRECISION, out_dtype=SUM)
        u = tl.dot(rows, w_u, u, input_precision=PRECISION, out_dtype=SUM)
    v += tl.load(b + h, h_ok, other=0.0)[None, :]
    u += tl.load(b + H + h, h_ok, other=0.0)[None, :]
    return activations(v, u, APPROX)


@triton.jit
def activations(v, u, APPROX: tl.constexpr):
    """Return tanh(v) and σ(u); APPROX: by the instruction that is right to 11 bits."""
    if APPROX:
        t = _tanh_approx(v)
        s = 0.5 * _tanh_approx(0.5 * u) + 0.5
    else:
        # of −|v|, so that nothing overflows
        e = tl.exp(-2 * tl.abs(v))
        t = tl.where(v < 0, e - 1, 1 - e) / (1 + e)
        s = 1 / (1 + tl.exp(-u))
    return t, s


@triton.jit
def _tanh_approx(z):
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def rounded(t, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """A factor of a product in DTYPE; UPCAST: back in float32, for the interpreter's products."""
    t = t.to(DTYPE)
    if UPCAST:
        t = t.to(tl.float32)
    return t
