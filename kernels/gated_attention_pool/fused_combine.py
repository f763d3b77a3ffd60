"""Add up the tiles of every bag in Triton; those of a long bag in two levels."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmil_fast.kernels.bags import Spans
from hmil_fast.kernels.tiles import Tiles, cut

_TILES = 64  # that a program has in hand at once, and that make a group of a long bag
_COLUMNS = 32

Sums = tuple[Tensor, Tensor, Tensor]


@triton.jit
def add_up(
    maxima, sums, pooled, parts, out_max, out_sum, out_pooled, D, C,
    STEP: tl.constexpr, LAST: tl.constexpr, TILES: tl.constexpr, BLOCK_D: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Add up the tiles of one part for a class and a block of columns, in their order.

    parts [·, STEP] begins with first tile and number of tiles. Gives maximum, Σ exp(s − max) and
    Σ exp(s − max) x as the tiles have them; if LAST, lse (in out_max) and pooled.
    """
    part, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(parts + STEP * part)
    count = tl.load(parts + STEP * part + 1)
    k = tl.arange(0, TILES)
    top = tl.full((TILES,), -float("inf"), SUM)
    for k0 in range(0, count, TILES):
        at = (first + k0 + k) * C + c
        top = tl.maximum(top, tl.load(maxima + at, k0 + k < count, other=-float("inf")))
    peak = tl.max(top, 0)
    total = tl.zeros((TILES,), SUM)
    rows = tl.zeros((TILES, BLOCK_D), SUM)
    for k0 in range(0, count, TILES):
        k_ok = k0 + k < count
        at = (first + k0 + k) * C + c
        weight = tl.where(k_ok, tl.exp(tl.load(maxima + at, k_ok, other=-float("inf")) - peak), 0.0)
        total += weight * tl.load(sums + at, k_ok, other=0.0)
        block = tl.load(
            pooled + at[:, None] * D + d[None, :], k_ok[:, None] & (d < D)[None, :], other=0.0
        )
        rows += weight[:, None] * block
    norm = tl.sum(total, 0)
    weighted = tl.sum(rows, 0)
    to = part * C + c
    if LAST:
        norm = tl.where(count > 0, norm, 1.0)
        weighted = weighted / norm  # 0 for an empty bag
        peak = tl.where(count > 0, peak + tl.log(norm), -float("inf"))
    tl.store(out_pooled + to * D + d, weighted, d < D)
    if tl.program_id(2) == 0:
        tl.store(out_max + to, peak)
        if not LAST:
            tl.store(out_sum + to, norm)


def combine(found: Sums, spans: Spans, tiles: Tiles, rows: int) -> tuple[Tensor, Tensor]:
    """Pooled [B, C, D] and lse [B, C] from maximum, sum and weighted sum of every tile.

    One program would go through all tiles of a bag, and of a bag alone there are few programs: the
    tiles of a long bag are added up in groups first. A bag gives the same bits whichever way, so
    that it may depend on what else is in the batch: a group alone is multiplied by exp(0).

    Args:
        found: [tiles, C], [tiles, C], [tiles, C, D].
        spans: The bags in x.
        tiles: They were cut into these.
        rows: Of a tile.
    """
    counts = [triton.cdiv(length, rows) for _, length in spans]
    parts = tiles.bags
    if max(counts, default=0) > _TILES:
        ends = torch.tensor(counts).cumsum(0).tolist()
        of_bags = [(end - count, count) for end, count in zip(ends, counts, strict=True)]
        groups = cut(of_bags, len(tiles.table), _TILES, parts.device)
        found = _launch(found, groups.table, last=False)
        parts = groups.bags
    lse, _, pooled = _launch(found, parts, last=True)
    return pooled, lse


def _launch(found: Sums, parts: Tensor, *, last: bool) -> Sums:
    classes, dim = found[2].shape[1:]
    maxima, sums, pooled = (t.new_empty(len(parts), *t.shape[1:]) for t in found)
    if pooled.numel():
        fixed, launch = combine_constants(found[0].dtype, parts.shape[1], last=last)
        with torch.cuda.device_of(parts):
            add_up[(len(parts), classes, triton.cdiv(dim, _COLUMNS))](
                *found, parts, maxima, sums, pooled, dim, classes, **fixed, **launch
            )
    return maxima, sums, pooled


def combine_constants(
    dtype: torch.dtype, step: int, *, last: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constexpr arguments and launch options of `add_up` for sums in `dtype`."""
    sums = tl.float64 if dtype == torch.float64 else tl.float32
    fixed = {"STEP": step, "LAST": last, "TILES": _TILES, "BLOCK_D": _COLUMNS, "SUM": sums}
    return fixed, {"num_warps": 4, "enable_fp_fusion": True}
