"""Cache decoded tiles of the slide file, so that overlapping reads rarely decode one twice."""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmil_fast.io.slide.base import WHITE
from hmil_fast.io.slide.protocol import Int64, TileStatus, UInt8
from hmil_fast.io.slide.tiff_facts import TiffLevel

MAX_BAND_BYTES = 512 * 2**20
SPARE_BUFFERS = 32


@dataclass(slots=True)
class SourceTile:
    """One of the file's own tiles; `pixels` is None where it is bad and white where it is cut."""

    pixels: UInt8 | None = None
    status: int = TileStatus.OK
    buffer: Any = None
    ready: bool = False
    pins: int = 0


DecodeTiles = Callable[[Sequence[int], list[Any]], list[SourceTile]]


class Band:
    """Decoded source tiles, each kept from its first use to its last.

    Read from the top down it holds about one row of source tiles. Where that is more than
    `MAX_BAND_BYTES` the oldest are dropped, and decoded again for who still wants them.
    """

    def __init__(
        self,
        facts: TiffLevel,
        decode: DecodeTiles,
        asked: Sequence[tuple[Int64, int]],
    ) -> None:
        """Count how often each source tile will be used.

        Args:
            facts: The level.
            decode: Makes source tiles, given their numbers and buffers that it may take.
            asked: The grids that will be read, as (xy, size).
        """
        self._facts = facts
        self._decode = decode
        self._most = max(1, MAX_BAND_BYTES // (facts.tile[0] * facts.tile[1] * 3))
        self._held: dict[int, SourceTile] = {}
        self._spare: list[Any] = []
        self._changed = threading.Condition()
        self._uses = uses(facts, asked)

    def read(self, xy: Int64, size: int, out: UInt8) -> UInt8:
        """See `TileBand.read`."""
        status = np.zeros(len(xy), np.uint8)
        first, last = touched(self._facts, xy, size)
        across = self._facts.grid[0]
        boxes = list(zip(first.tolist(), last.tolist(), strict=True))
        for n, ((x0, y0), (x1, y1)) in enumerate(boxes):
            needed = [y * across + x for y in range(y0, y1 + 1) for x in range(x0, x1 + 1)]
            tiles = self._take(needed)
            try:
                status[n] = self._cut(tiles, (x0, y0, x1, y1), xy[n].tolist(), out[n])
            finally:
                self._give_back(needed, tiles)
        return status

    def _take(self, needed: Iterable[int]) -> dict[int, SourceTile]:
        """Source tiles by number, pinned: our part decoded here, the rest by other threads."""
        tiles: dict[int, SourceTile] = {}
        own: list[int] = []
        with self._changed:
            for number in needed:
                if number in tiles:
                    continue
                if number not in self._held:
                    self._held[number] = SourceTile()
                    own.append(number)
                tiles[number] = self._held[number]
                tiles[number].pins += 1
            spare = [self._spare.pop() for _ in range(min(len(own), len(self._spare)))]
        if own:
            # whatever happens to us, nobody may wait for ever
            made = [SourceTile(status=TileStatus.FAILED)] * len(own)
            try:
                made = self._decode(own, spare)
            finally:
                with self._changed:
                    for number, new in zip(own, made, strict=True):
                        tile = tiles[number]
                        tile.pixels, tile.status, tile.buffer = new.pixels, new.status, new.buffer
                        tile.ready = True
                    self._changed.notify_all()
        if not all(tile.ready for tile in tiles.values()):
            with self._changed:
                self._changed.wait_for(lambda: all(tile.ready for tile in tiles.values()))
        return tiles

    def _give_back(self, needed: Iterable[int], tiles: dict[int, SourceTile]) -> None:
        with self._changed:
            for number in needed:
                self._uses[number] -= 1
            for number, tile in tiles.items():
                tile.pins -= 1
                if self._uses[number] <= 0 and not tile.pins:
                    self._drop(number)
            if len(self._held) > self._most:
                unpinned = [number for number, tile in self._held.items() if not tile.pins]
                for number in unpinned[: len(self._held) - self._most]:
                    self._drop(number)

    def _drop(self, number: int) -> None:
        tile = self._held.pop(number, None)
        if tile is not None and tile.buffer is not None and len(self._spare) < SPARE_BUFFERS:
            tile.pixels = None
            self._spare.append(tile.buffer)

    def _cut(
        self,
        tiles: dict[int, SourceTile],
        box: tuple[int, int, int, int],
        corner: Sequence[int],
        out: UInt8,
    ) -> int:
        """Put one asked tile together; the worst status of the source tiles in its box."""
        (wide, high), (tile_w, tile_h) = self._facts.size, self._facts.tile
        left, top = corner
        right, bottom = min(left + len(out), wide), min(top + len(out), high)
        first_x, first_y, last_x, last_y = box
        across = self._facts.grid[0]
        if left < 0 or top < 0 or right < left + len(out) or bottom < top + len(out):
            out[:] = WHITE
        status = 0
        for y in range(first_y, last_y + 1):
            at_y = y * tile_h
            y0, y1 = max(top, at_y), min(bottom, at_y + tile_h)
            for x in range(first_x, last_x + 1):
                tile = tiles[y * across + x]
                if tile.pixels is None:
                    status = max(status, tile.status)
                    continue
                at_x = x * tile_w
                x0, x1 = max(left, at_x), min(right, at_x + tile_w)
                out[y0 - top : y1 - top, x0 - left : x1 - left] = tile.pixels[
                    y0 - at_y : y1 - at_y, x0 - at_x : x1 - at_x
                ]
        if status:
            out[:] = WHITE
        return status


def uses(facts: TiffLevel, asked: Sequence[tuple[Int64, int]]) -> NDArray[np.int32]:
    """How many asked tiles touch each source tile, int32 [source tiles]."""
    counts = np.zeros(len(facts.offsets), np.int32)
    for xy, size in asked:
        for numbers in _numbers(facts, *touched(facts, xy, size)):
            np.add.at(counts, numbers, 1)
    return counts


def touched(facts: TiffLevel, xy: Int64, size: int) -> tuple[Int64, Int64]:
    """First and last source tile (column, row) under each asked one, each int64 [n, 2].

    The last lies before the first where a tile is outside the level altogether.
    """
    tile, full = np.array(facts.tile, np.int64), np.array(facts.size, np.int64)
    first = np.maximum(xy, 0) // tile
    last = (np.minimum(xy + size, full) - 1) // tile
    outside = ((xy >= full) | (xy + size <= 0)).any(axis=1)
    last[outside] = first[outside] - 1
    return first, last


def _numbers(facts: TiffLevel, first: Int64, last: Int64) -> Iterable[Int64]:
    """The numbers of all source tiles under asked ones, in a few arrays."""
    if not len(first):
        return
    most = (last - first).max(axis=0) + 1
    for row in range(int(most[1])):
        for column in range(int(most[0])):
            x, y = first[:, 0] + column, first[:, 1] + row
            inside = (x <= last[:, 0]) & (y <= last[:, 1])
            yield y[inside] * facts.grid[0] + x[inside]
