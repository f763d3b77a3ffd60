"""Cut bags into tiles of rows for the fused kernels; each tile lies inside one bag."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hmil_fast.kernels.bags import Spans

# rows whose gate gradients exist at once: so many that a GPU works longer on a chunk than the host
# takes to launch it; 168 MB for 320 hidden units in half precision
_CHUNK = 131_072


class Chunk(NamedTuple):
    """Tiles of some thousand rows, worked on together in the backward pass.

    Attributes:
        table: Their part of `Tiles.table`.
        rows: Their rows in all.
        where: The rows in x: a slice if they follow one another, else their numbers.
    """

    table: Tensor
    rows: int
    where: slice | Tensor


class Tiles(NamedTuple):
    """Tiles of all bags, on the device of x.

    Attributes:
        table: int64 [tiles, 4]: first row in x, rows, bag, first row among the rows of all tiles.
        bags: int64 [B, 2]: first tile and number of tiles of each bag.
        whole: Whether every row of x is in a tile.
        chunks: The tiles again, in their order.
    """

    table: Tensor
    bags: Tensor
    whole: bool
    chunks: list[Chunk]


def overlap(spans: Spans) -> bool:
    """Whether a row is in two bags."""
    end = 0
    for start, length in sorted(span for span in spans if span[1]):
        if start < end:
            return True
        end = start + length
    return False


def cut(spans: Spans, rows: int, tile: int, device: torch.device) -> Tiles:
    """Cut bags that do not overlap into tiles of `tile` rows, the last of a bag shorter.

    A bag is cut alike wherever it lies and whatever comes with it: hence its bits are the same.
    """
    starts, lengths = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2).unbind(1)
    counts = (lengths + tile - 1) // tile
    first = counts.cumsum(0) - counts
    bag = torch.repeat_interleave(torch.arange(len(spans)), counts)
    within = (torch.arange(len(bag)) - first[bag]) * tile
    size = (lengths[bag] - within).clamp(max=tile)
    packed = size.cumsum(0) - size
    table = torch.stack([starts[bag] + within, size, bag, packed], 1)
    there = table.to(device, non_blocking=True)
    bag_tiles = torch.stack([first, counts], 1).to(device, non_blocking=True)
    return Tiles(there, bag_tiles, int(lengths.sum()) == rows, _chunks(table, there))


def _chunks(table: Tensor, there: Tensor) -> list[Chunk]:
    start, size, _, packed = table.unbind(1)
    total = int(size.sum())
    edges = torch.searchsorted(packed.contiguous(), torch.arange(0, total, _CHUNK))
    chunks = []
    for lo, hi in pairwise([*sorted(set(edges.tolist())), len(table)]):
        if lo == hi:
            continue
        s, n = start[lo:hi], size[lo:hi]
        rows = int(n.sum())
        where: slice | Tensor = slice(int(s[0]), int(s[0]) + rows)
        if not torch.equal(s[1:], s[:-1] + n[:-1]):
            shift = (s - packed[lo:hi]).repeat_interleave(n)
            numbers = torch.arange(int(packed[lo]), int(packed[lo]) + rows) + shift
            where = numbers.to(there.device, non_blocking=True)
        chunks.append(Chunk(there[lo:hi], rows, where))
    return chunks
