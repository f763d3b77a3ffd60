"""What the products of rows are in the sums of SupCon, in Triton, for all kernels of it."""

import triton
import triton.language as tl


@triton.jit
def of_others(s, m, n, R):
    """The products s of rows m and n, −inf where n is m or no row."""
    return tl.where((n < R)[None, :] & (m[:, None] != n[None, :]), s, -float("inf"))


@triton.jit
def add_exponentials(top, total, s):
    """Running maximum and Σ exp2(s − maximum) of rows, with the columns of s."""
    higher = tl.maximum(top, tl.max(s, 1))
    pivot = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has met itself only
    return higher, total * tl.exp2(top - pivot) + tl.sum(tl.exp2(s - pivot[:, None]), 1)


@triton.jit
def weigh(s, lse, grad, lse_m, grad_m, n, R):
    """What the row n weighs in the gradient of the row m: grad_m p_mn + grad_n p_nm."""
    lse_n = tl.load(lse + n, n < R, other=0.0)
    grad_n = tl.load(grad + n, n < R, other=0.0)
    weights = grad_m[:, None] * tl.exp2(s - lse_m[:, None])
    return weights + grad_n[None, :] * tl.exp2(s - lse_n[None, :])
