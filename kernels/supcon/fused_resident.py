"""The sums of SupCon in Triton for rows that fit the chip: a block stays there, columns pass by.

Of the bytes that `fused` moves from the cache for a pair of rows, this moves half in the forward
pass (8 of 16 at 256 columns) and at most a third in the backward pass (8 or 16 of 48). It serves
products in one pass of tf32; the three passes of tf32x3 would have to hold every factor twice.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hmil_fast.kernels.supcon.fused_terms import add_exponentials, of_others, weigh


class Config(NamedTuple):
    """Constants of the kernels, and how they are launched."""

    ROWS: int
    COLUMNS: int
    WIDTH: int
    PRECISION: str
    num_warps: int
    num_stages: int


# by columns of a row, rounded up: rows and columns of a block of products, stages
_Shapes = dict[int, tuple[int, int, int]]
_LSE: dict[int, _Shapes] = {
    80: {64: (128, 64, 3), 128: (128, 64, 3), 256: (128, 32, 2)},
    86: {64: (128, 64, 3), 128: (128, 32, 3)},
}
_BACKWARD: dict[int, _Shapes] = {
    80: {64: (128, 32, 2), 128: (128, 16, 2), 256: (64, 32, 2)},
    86: {64: (128, 32, 2), 128: (128, 16, 2), 256: (64, 16, 2)},
    90: {64: (128, 32, 2), 128: (128, 32, 2), 256: (128, 16, 2)},
    100: {64: (128, 32, 2), 128: (128, 32, 2), 256: (128, 32, 2)},
}
_LSE |= {90: _LSE[80], 100: _LSE[80]}


def configuration(*, backward: bool, dim: int, precision: str, arch: int) -> Config | None:
    """The configuration of a pass; None where the rows do not fit or the products are in tf32x3.

    Args:
        backward: Which pass.
        dim: D.
        precision: Of products, as Triton names it; "ieee" is for the interpreter.
        arch: Compute capability × 10.
    """
    # sm_86, sm_89 and sm_120 have 99 KB of shared memory for a block
    family = {80: 80, 90: 90, 100: 100, 103: 100}.get(arch, 86)
    width = max(64, triton.next_power_of_2(dim))
    shape = (_BACKWARD if backward else _LSE)[family].get(width)
    if shape is None or precision == "tf32x3":
        return None
    rows, columns, stages = (16, 32, 1) if precision == "ieee" else shape
    return Config(rows, columns, width, precision, 8, stages)


@triton.jit
def load_rows(z, n, d, R, D):
    """Rows n of z [R, D], zeros beyond."""
    at = z + n.to(tl.int64)[:, None] * D + d[None, :]
    return tl.load(at, (n < R)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def lse_kernel(
    z, partial, scale, R, D, SHARE,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`fused.lse_kernel` for D of at most WIDTH."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    share = tl.program_id(1)
    d = tl.arange(0, WIDTH)
    # scaled here and not the products: so sm_90 multiplies it from registers, which halves what
    # its units read from shared memory
    own = (load_rows(z, m, d, R, D) * scale).to(SUM)
    top = tl.full((ROWS,), -float("inf"), SUM)
    total = tl.zeros((ROWS,), SUM)
    for n0 in range(share * SHARE, tl.minimum((share + 1) * SHARE, R), COLUMNS):
        n = n0 + tl.arange(0, COLUMNS)
        other = tl.trans(load_rows(z, n, d, R, D))
        s = tl.dot(own, other, input_precision=PRECISION, out_dtype=SUM)
        top, total = add_exponentials(top, total, of_others(s, m, n, R))
    lse = tl.where(total == 0.0, -float("inf"), top + tl.log2(total))
    tl.store(partial + share.to(tl.int64) * R + m, lse, m < R)


@triton.jit
def backward_kernel(
    z, lse, grad, partial, scale, R, D, SHARE,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`fused.backward_kernel` for D of at most WIDTH.

    In halves of the width: sm_90 brings its columns into another order by way of registers, and
    those of the whole width are too many.
    """
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    share = tl.program_id(1)
    HALF: tl.constexpr = WIDTH // 2
    d = tl.arange(0, HALF)
    own_1 = load_rows(z, m, d, R, D)
    own_2 = load_rows(z, m, HALF + d, R, D)
    lse_m = tl.load(lse + m, m < R, other=0.0)
    grad_m = tl.load(grad + m, m < R, other=0.0)
    sums_1 = tl.zeros((ROWS, HALF), SUM)
    sums_2 = tl.zeros((ROWS, HALF), SUM)
    for n0 in range(share * SHARE, tl.minimum((share + 1) * SHARE, R), COLUMNS):
        n = n0 + tl.arange(0, COLUMNS)
        other_1 = load_rows(z, n, d, R, D)
        other_2 = load_rows(z, n, HALF + d, R, D)
        s = tl.dot(own_1, tl.trans(other_1), input_precision=PRECISION, out_dtype=SUM)
        s = tl.dot(own_2, tl.trans(other_2), s, input_precision=PRECISION, out_dtype=SUM)
        weights = weigh(of_others(s * scale, m, n, R), lse, grad, lse_m, grad_m, n, R)
        sums_1 = tl.dot(weights, other_1, sums_1, input_precision=PRECISION, out_dtype=SUM)
        sums_2 = tl.dot(weights, other_2, sums_2, input_precision=PRECISION, out_dtype=SUM)
    at = partial + (share.to(tl.int64) * R + m)[:, None] * D + d[None, :]
    tl.store(at, sums_1, (m < R)[:, None] & (d < D)[None, :])
    tl.store(at + HALF, sums_2, (m < R)[:, None] & (HALF + d < D)[None, :])
