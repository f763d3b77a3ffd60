"""Read tiled RGB TIFFs: check each tile's bytes, then decode it with a source."""

import os
import threading
from collections.abc import Sequence
from math import gcd
from typing import Any

import numpy as np

from hmil_fast.io.slide.base import WHITE, BaseReader
from hmil_fast.io.slide.jpeg_check import Look, jpeg_tables, look_at_jpeg, whole_jpeg2000
from hmil_fast.io.slide.protocol import Int64, SlideInfo, TileStatus, UInt8
from hmil_fast.io.slide.source_tile_cache import Band, SourceTile
from hmil_fast.io.slide.sources import JPEG, UNCOMPRESSED, Source
from hmil_fast.io.slide.tiff_facts import TiffFacts, TiffLevel

MAX_IN_VAIN = 200  # a refusal costs OpenSlide two opens of the file


class TiledReader(BaseReader):
    """One handle on the file for all threads, and a source that decodes.

    A tile that does not look like what every decoder reads is read by OpenSlide, or is a bad one.
    After `MAX_IN_VAIN` refusals in a row OpenSlide is not asked again.
    """

    def __init__(self, info: SlideInfo, facts: TiffFacts, source: Source) -> None:
        super().__init__(info)
        self._levels = facts.levels
        self._tables = {level.tables: jpeg_tables(level.tables) for level in facts.levels}
        self._source = source
        self._file = os.open(info.path, os.O_RDONLY | os.O_CLOEXEC)
        self._second: BaseReader | None = None
        self._refused: set[tuple[int, int]] = set()  # by OpenSlide, as (level, tile)
        self._in_vain = 0
        self._opening = threading.Lock()

    def read(self, level: int, xy: Int64, size: int, out: UInt8) -> UInt8:
        """See `SlideReader.read`."""
        return self.band(level, [(xy, size)]).read(xy, size, out)

    def band(self, level: int, asked: Sequence[tuple[Int64, int]]) -> Band:
        """See `SlideReader.band`."""

        def decode(tiles: Sequence[int], spare: list[Any]) -> list[SourceTile]:
            return self.decode(level, tiles, spare)

        return Band(self._levels[level], decode, asked)

    def close(self) -> None:
        """Free the handles on the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._source.close()
        if self._second is not None:
            self._second.close()

    def facts(self, level: int) -> TiffLevel:
        """A level as the file stores it."""
        return self._levels[level]

    def decode(self, level: int, tiles: Sequence[int], spare: list[Any]) -> list[SourceTile]:
        """Source tiles by number, checked and decoded on the CPU; from several threads at once.

        Args:
            level: Pyramid level.
            tiles: Their numbers.
            spare: Buffers of this level that may be decoded into.
        """
        facts = self._levels[level]
        made: dict[int, SourceTile] = {}
        whole: dict[int, bytes] = {}
        odd: list[int] = []
        for number in tiles:
            if not facts.counts[number]:
                made[number] = SourceTile(_background(facts))
                continue
            data, look = self.data(level, number)
            made[number] = SourceTile(status=TileStatus.CORRUPT)
            if look == Look.WHOLE:
                whole[number] = data
            elif look == Look.ODD:
                odd.append(number)
        if whole:
            decoded = self._source.decode(level, list(whole), list(whole.values()), spare)
            for number, (pixels, buffer) in zip(whole, decoded, strict=True):
                made[number] = SourceTile(pixels, TileStatus.FAILED, buffer)
                if pixels is None:
                    odd.append(number)
        for number in odd:
            if self._in_vain >= MAX_IN_VAIN or (level, number) in self._refused:
                continue
            made[number].pixels = self._by_openslide(level, number)
            if made[number].pixels is None:
                self._refused.add((level, number))
                self._in_vain += 1
            else:
                self._in_vain = 0
        for tile in made.values():
            if tile.pixels is not None:
                tile.status = TileStatus.OK
        return [made[number] for number in tiles]

    def data(self, level: int, tile: int) -> tuple[bytes, Look]:
        """A source tile's bytes and what they look like; from several threads at once."""
        facts = self._levels[level]
        offset, count = int(facts.offsets[tile]), int(facts.counts[tile])
        pixels = facts.tile[0] * facts.tile[1]
        # no codec grows so much; bounds what is read into memory
        if offset == 0 or count > 16 * pixels + 65_536:
            return b"", Look.BROKEN
        data = os.pread(self._file, count, offset)
        if len(data) < count:
            return b"", Look.BROKEN
        if facts.compression == JPEG:
            return data, look_at_jpeg(data, facts.tile, self._tables[facts.tables])
        if facts.compression == UNCOMPRESSED:
            return data, Look.WHOLE if count == 3 * pixels else Look.BROKEN
        return data, Look.WHOLE if whole_jpeg2000(data, facts.tile) else Look.BROKEN

    def _by_openslide(self, level: int, tile: int) -> UInt8 | None:
        """A source tile as OpenSlide reads it, uint8 [h, w, 3], or None where it does not."""
        import openslide

        from hmil_fast.io.slide.openslide_reader import OpenSlideReader

        with self._opening:
            try:
                self._second = self._second or OpenSlideReader(self._info.path, None)
            except openslide.OpenSlideError:
                return None
        size, theirs = self._levels[level].size, self._second.info.level_dimensions
        if size not in theirs:  # it does not see levels in SubIFDs
            return None
        wide, high = self._levels[level].tile
        row, column = divmod(tile, self._levels[level].grid[0])
        # it reads squares
        side = gcd(wide, high)
        y, x = np.mgrid[0:high:side, 0:wide:side]
        corners = np.stack([x + column * wide, y + row * high], -1).reshape(-1, 2)
        out = np.empty((len(corners), side, side, 3), np.uint8)
        if self._second.read(theirs.index(size), corners, side, out).any():
            return None
        squares = out.reshape(high // side, wide // side, side, side, 3)
        return squares.swapaxes(1, 2).reshape(high, wide, 3)


def _background(level: TiffLevel) -> UInt8:
    """What a sparse file leaves out, uint8 [h, w, 3]."""
    wide, high = level.tile
    return np.broadcast_to(np.uint8(WHITE), (high, wide, 3))
