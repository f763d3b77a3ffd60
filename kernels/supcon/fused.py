"""The sums of SupCon in Triton; products of rows stay in registers.

A program owns a block of rows and runs over a share of the columns; the shares of a block are
added up in their order, without atomics. The running maximum costs little beside the products and
holds for any temperature and length of rows, without a look at values that the host must wait for.

The kernels here read rows and columns in blocks of BLOCK_K, for every block of products; where the
rows fit the chip as a whole, those of fused_resident.py serve.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmil_fast.kernels.dispatch import exact_products, interpreted
from hmil_fast.kernels.launch import constants, options
from hmil_fast.kernels.supcon import fused_resident
from hmil_fast.kernels.supcon.fused_terms import add_exponentials, of_others, weigh

_PROGRAMS = 2  # per multiprocessor; fewer leave some idle
_MAX_SHARES = 8  # each holds a partial gradient [R, D]


class Config(NamedTuple):
    """Constants of the kernels, and how they are launched."""

    ROWS: int
    COLUMNS: int
    BLOCK_K: int
    PRECISION: str
    num_warps: int
    num_stages: int


# none spills a register on sm_80 to sm_120; "ieee" is for the interpreter
LSE = {
    "tf32": Config(128, 128, 32, "tf32", 8, 3),
    "tf32x3": Config(128, 64, 16, "tf32x3", 8, 2),
    "ieee": Config(16, 32, 16, "ieee", 4, 1),
}
BACKWARD = {
    "tf32": Config(64, 64, 32, "tf32", 8, 2),
    "tf32x3": Config(32, 32, 32, "tf32x3", 8, 1),
    "ieee": Config(16, 32, 16, "ieee", 4, 1),
}


@triton.jit
def _products(
    z, m, n, R, D, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """z_m·z_n · scale, −inf where n is m or no row."""
    k = tl.arange(0, BLOCK_K)
    left = z + m.to(tl.int64)[:, None] * D + k[None, :]
    right = z + n.to(tl.int64)[None, :] * D + k[:, None]
    s = tl.zeros((ROWS, COLUMNS), SUM)
    for k0 in range(0, D, BLOCK_K):
        k_ok = k0 + k < D
        a = tl.load(left + k0, (m < R)[:, None] & k_ok[None, :], other=0.0)
        b = tl.load(right + k0, (n < R)[None, :] & k_ok[:, None], other=0.0)
        s = tl.dot(a, b, s, input_precision=PRECISION, out_dtype=SUM)
    return of_others(s * scale, m, n, R)


@triton.jit
def lse_kernel(
    z, partial, scale, R, D, SHARE,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 Σ exp2(z_m·z_n · scale) of a block of rows over one share of the columns."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    share = tl.program_id(1)
    top = tl.full((ROWS,), -float("inf"), SUM)
    total = tl.zeros((ROWS,), SUM)
    for n0 in range(share * SHARE, tl.minimum((share + 1) * SHARE, R), COLUMNS):
        n = n0 + tl.arange(0, COLUMNS)
        s = _products(z, m, n, R, D, scale, ROWS, COLUMNS, BLOCK_K, SUM, PRECISION)
        top, total = add_exponentials(top, total, s)
    lse = tl.where(total == 0.0, -float("inf"), top + tl.log2(total))
    tl.store(partial + share.to(tl.int64) * R + m, lse, m < R)


@triton.jit
def backward_kernel(
    z, lse, grad, partial, scale, R, D, SHARE,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_n (grad_m p_mn + grad_n p_nm) z_n of a block of rows over one share of the columns."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    share = tl.program_id(1)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    lse_m = tl.load(lse + m, m < R, other=0.0)
    grad_m = tl.load(grad + m, m < R, other=0.0)
    sums = tl.zeros((ROWS, BLOCK_D), SUM)
    for n0 in range(share * SHARE, tl.minimum((share + 1) * SHARE, R), COLUMNS):
        n = n0 + tl.arange(0, COLUMNS)
        s = _products(z, m, n, R, D, scale, ROWS, COLUMNS, BLOCK_K, SUM, PRECISION)
        weights = weigh(s, lse, grad, lse_m, grad_m, n, R)
        at = z + n.to(tl.int64)[:, None] * D + d[None, :]
        rows = tl.load(at, (n < R)[:, None] & (d < D)[None, :], other=0.0)
        sums = tl.dot(weights, rows, sums, input_precision=PRECISION, out_dtype=SUM)
    at = partial + (share.to(tl.int64) * R + m)[:, None] * D + d[None, :]
    tl.store(at, sums, (m < R)[:, None] & (d < D)[None, :])


def lse_fused(z: Tensor, temperature: float) -> Tensor:
    """`lse_streaming` on a GPU."""
    (rows, dim), z = z.shape, z.contiguous()
    if rows < 2:
        return z.new_zeros(rows)
    config = configuration(z, backward=False)
    kernel = lse_kernel if isinstance(config, Config) else fused_resident.lse_kernel
    shares, share = column_shares(rows, config, z.device)
    partial = z.new_empty(shares, rows)
    with torch.cuda.device_of(z):
        kernel[(triton.cdiv(rows, config.ROWS), shares)](
            z, partial, math.log2(math.e) / temperature, rows, dim, share,
            SUM=_sum(z), **constants(config), **options(config),
        )  # fmt: skip
    return torch.logsumexp(partial.mul_(math.log(2)), 0)


def lse_fused_backward(grad: Tensor, z: Tensor, lse: Tensor, temperature: float) -> Tensor:
    """`lse_streaming_backward` on a GPU."""
    (rows, dim), z = z.shape, z.contiguous()
    if not z.numel():
        return torch.zeros_like(z)
    config = configuration(z, backward=True)
    kernel, blocks, fixed = fused_resident.backward_kernel, 1, {}
    if isinstance(config, Config):
        block_d = min(256, max(16, triton.next_power_of_2(dim)))
        kernel, blocks, fixed = backward_kernel, triton.cdiv(dim, block_d), {"BLOCK_D": block_d}
    shares, share = column_shares(rows, config, z.device)
    partial = z.new_empty(shares, rows, dim)
    with torch.cuda.device_of(z):
        kernel[(triton.cdiv(rows, config.ROWS), shares, blocks)](
            z, lse * math.log2(math.e), grad.contiguous(), partial,
            math.log2(math.e) / temperature, rows, dim, share,
            **fixed, SUM=_sum(z), **constants(config), **options(config),
        )  # fmt: skip
    return partial.sum(0).div_(temperature)


def configuration(z: Tensor, *, backward: bool) -> Config | fused_resident.Config:
    """Of one pass; which kernel it is for shows by its type."""
    precision = product_precision()
    major, minor = torch.cuda.get_device_capability(z.device) if z.is_cuda else (8, 0)
    kept = fused_resident.configuration(
        backward=backward, dim=z.shape[1], precision=precision, arch=10 * major + minor
    )
    return kept or (BACKWARD if backward else LSE)[precision]


def column_shares(
    rows: int, config: Config | fused_resident.Config, device: torch.device
) -> tuple[int, int]:
    """Number of shares of the columns, and columns of each."""
    units = 1
    if device.type == "cuda":
        units = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.cdiv(_PROGRAMS * units, triton.cdiv(rows, config.ROWS))
    blocks = triton.cdiv(rows, config.COLUMNS)
    share = triton.cdiv(blocks, min(wanted, blocks, _MAX_SHARES)) * config.COLUMNS
    return triton.cdiv(rows, share), share


def product_precision() -> str:
    """Triton's name of the precision of products that torch is set to."""
    if interpreted():
        return "ieee"
    return "tf32x3" if exact_products() else "tf32"


def _sum(z: Tensor) -> Any:
    return tl.float64 if z.dtype == torch.float64 else tl.float32
