"""Hierarchy alignment in Triton: each tile of a bag's logits is read once in each direction.

Tiles leave partial sums, which are added up in their order, without atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmil_fast.kernels.bags import Spans
from hmil_fast.kernels.tiles import Tiles, cut

Level = tuple[Tensor, Tensor]  # logits [N, C], lse [B, C]

ROWS = 64  # with 128, 32 classes a level do not fit the registers
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
_TILES = 64  # partial sums added up at once


@triton.jit
def _attention(
    logits, lse, first, bag, ok, C,
    CLASSES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """exp(logits − lse) of a tile, each row over its largest entry; 0 where there is no class."""
    c = tl.arange(0, CLASSES)
    at = (first + tl.arange(0, ROWS))[:, None] * C + c[None, :]
    s = tl.load(logits + at, ok[:, None] & (c < C)[None, :], other=0.0)
    s -= tl.load(lse + bag * C + c, c < C, other=0.0)[None, :]
    s = tl.where((c < C)[None, :], s, -float("inf"))
    return tl.exp(s - tl.max(s, 1)[:, None])


@triton.jit
def _compare(
    coarse, coarse_lse, fine, fine_lse, parent, weight, first, bag, ok, CC, CF,
    COARSE: tl.constexpr, FINE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Unit vectors along the coarse attention and the children's sums; the fine attention, the
    norm of the sums, 1 − cosine.
    """  # noqa: D205
    a = _attention(coarse, coarse_lse, first, bag, ok, CC, COARSE, ROWS)
    b = _attention(fine, fine_lse, first, bag, ok, CF, FINE, ROWS)
    c, f = tl.arange(0, COARSE), tl.arange(0, FINE)
    above = tl.load(parent + f, f < CF, other=-1)
    s = tl.zeros_like(a)
    for k in range(CC):
        summed = tl.sum(tl.where((above == k)[None, :], b, 0.0), 1)
        s = tl.where((c == k)[None, :], summed[:, None], s)
    s *= tl.load(weight + c, c < CC, other=0.0)[None, :]
    norm = tl.sqrt(tl.sum(s * s, 1))
    a = a / tl.sqrt(tl.sum(a * a, 1))[:, None]
    s = s / norm[:, None]
    gap = s - a
    return a, s, b, norm, tl.sum(gap * gap, 1) / 2


@triton.jit
def forward_kernel(
    coarse, coarse_lse, fine, fine_lse, parent, weight, table, partial, CC, CF,
    COARSE: tl.constexpr, FINE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Σ (1 − cosine) over the rows of one tile."""
    tile = tl.program_id(0).to(tl.int64)
    first = tl.load(table + 4 * tile)
    ok = tl.arange(0, ROWS) < tl.load(table + 4 * tile + 1)
    bag = tl.load(table + 4 * tile + 2)
    _, _, _, _, apart = _compare(
        coarse, coarse_lse, fine, fine_lse, parent, weight, first, bag, ok, CC, CF,
        COARSE, FINE, ROWS,
    )  # fmt: skip
    tl.store(partial + tile, tl.sum(tl.where(ok, apart, 0.0), 0))


@triton.jit
def backward_kernel(
    coarse, coarse_lse, fine, fine_lse, parent, weight, table, share, d_coarse, d_fine, partial,
    CC, CF, COARSE: tl.constexpr, FINE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits of one tile, and their negative sums over its rows."""
    tile = tl.program_id(0).to(tl.int64)
    first = tl.load(table + 4 * tile)
    ok = tl.arange(0, ROWS) < tl.load(table + 4 * tile + 1)
    bag = tl.load(table + 4 * tile + 2)
    a, s, b, norm, apart = _compare(
        coarse, coarse_lse, fine, fine_lse, parent, weight, first, bag, ok, CC, CF,
        COARSE, FINE, ROWS,
    )  # fmt: skip
    scale = tl.load(share + bag)
    c, f = tl.arange(0, COARSE), tl.arange(0, FINE)
    gap = s - a
    d_a = -scale * a * (gap + apart[:, None] * a)
    d_s = scale * (gap - apart[:, None] * s) / norm[:, None]
    d_s *= tl.load(weight + c, c < CC, other=0.0)[None, :]
    above = tl.load(parent + f, f < CF, other=-1)
    d_b = tl.zeros_like(b)
    for k in range(CC):
        of_class = tl.sum(tl.where((c == k)[None, :], d_s, 0.0), 1)
        d_b = tl.where((above == k)[None, :], of_class[:, None], d_b)
    d_b *= b
    rows = (first + tl.arange(0, ROWS))[:, None]
    tl.store(d_coarse + rows * CC + c[None, :], d_a, ok[:, None] & (c < CC)[None, :])
    tl.store(d_fine + rows * CF + f[None, :], d_b, ok[:, None] & (f < CF)[None, :])
    at = partial + tile * (CC + CF)
    tl.store(at + c, -tl.sum(tl.where(ok[:, None], d_a, 0.0), 0), c < CC)
    tl.store(at + CC + f, -tl.sum(tl.where(ok[:, None], d_b, 0.0), 0), f < CF)


@triton.jit
def combine_kernel(
    partial, bags, sums, COUNT,
    COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The sums of one bag's tiles [COUNT], in their order."""
    bag = tl.program_id(0).to(tl.int64)
    first = tl.load(bags + 2 * bag)
    count = tl.load(bags + 2 * bag + 1)
    k, c = tl.arange(0, TILES), tl.arange(0, COLUMNS)
    total = tl.zeros((TILES, COLUMNS), partial.dtype.element_ty)
    for k0 in range(0, count, TILES):
        at = partial + (first + k0 + k)[:, None] * COUNT + c[None, :]
        total += tl.load(at, (k0 + k < count)[:, None] & (c < COUNT)[None, :], other=0.0)
    tl.store(sums + bag * COUNT + c, tl.sum(total, 0), c < COUNT)


def alignment_fused(
    coarse: Level, fine: Level, parent: Tensor, spans: Spans, average: bool
) -> Tensor:
    """`alignment_streaming` on a GPU, for bags that do not overlap."""
    tiles, operands, shape = _prepared(coarse, fine, parent, spans, average)
    partial = coarse[0].new_empty(len(tiles.table), 1)
    with torch.cuda.device_of(partial):
        if len(partial):
            forward_kernel[(len(partial),)](*operands, tiles.table, partial, *shape, **OPTIONS)
        return _combined(partial, tiles).squeeze(1) / _sizes(spans, partial)


def alignment_fused_backward(
    grad: Tensor, coarse: Level, fine: Level, parent: Tensor, spans: Spans, average: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`alignment_streaming_backward` on a GPU, for bags that do not overlap."""
    tiles, operands, shape = _prepared(coarse, fine, parent, spans, average)
    fresh = torch.empty_like if tiles.whole else torch.zeros_like
    dense = torch.contiguous_format
    d_coarse, d_fine = (fresh(level[0], memory_format=dense) for level in (coarse, fine))
    classes = d_coarse.shape[1], d_fine.shape[1]
    partial = grad.new_empty(len(tiles.table), sum(classes))
    share = grad / _sizes(spans, grad)
    with torch.cuda.device_of(partial):
        if len(partial):
            backward_kernel[(len(partial),)](
                *operands, tiles.table, share, d_coarse, d_fine, partial, *shape, **OPTIONS
            )
        lse = _combined(partial, tiles).split(classes, dim=1)
    # clones: results of an op may not share memory
    d_coarse_lse, d_fine_lse = (t.clone(memory_format=dense) for t in lse)
    return d_coarse, d_coarse_lse, d_fine, d_fine_lse


def _prepared(
    coarse: Level, fine: Level, parent: Tensor, spans: Spans, average: bool
) -> tuple[Tiles, list[Tensor], list[int]]:
    """Tiles, the tensors that both kernels begin with, and the sizes that they end with."""
    tiles = cut(spans, len(coarse[0]), ROWS, parent.device)
    classes = [coarse[0].shape[1], fine[0].shape[1]]
    weight = coarse[0].new_ones(classes[0])
    if average:
        own = torch.arange(classes[0], device=parent.device)[:, None] == parent
        weight = weight / own.sum(1).clamp_min(1)
    operands = [t.contiguous() for t in (*coarse, *fine, parent, weight)]
    return tiles, operands, [*classes, *(triton.next_power_of_2(c) for c in classes), ROWS]


def _combined(partial: Tensor, tiles: Tiles) -> Tensor:
    count = partial.shape[1]
    sums = partial.new_empty(len(tiles.bags), count)
    if len(sums):
        columns = triton.next_power_of_2(count)
        combine_kernel[(len(sums),)](
            partial, tiles.bags, sums, count, columns, _TILES, num_warps=4, enable_fp_fusion=True
        )
    return sums


def _sizes(spans: Spans, like: Tensor) -> Tensor:
    sizes = torch.tensor([max(length, 1) for _, length in spans], dtype=like.dtype)
    return sizes.to(like.device, non_blocking=True)
