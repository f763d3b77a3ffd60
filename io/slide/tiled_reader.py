"""Tiled TIFFs of RGB tiles: their bytes read and checked here, their pixels made by a source."""

import os
from collections.abc import Sequence
from typing import Any

from hmil_fast.io.slide.band import Band, SourceTile
from hmil_fast.io.slide.base import BaseReader
from hmil_fast.io.slide.codestream import jpeg_tables, whole_jpeg, whole_jpeg2000
from hmil_fast.io.slide.protocol import Int64, SlideInfo, TileStatus, UInt8
from hmil_fast.io.slide.sources import JPEG, UNCOMPRESSED, Source
from hmil_fast.io.slide.tiff_facts import TiffFacts, TiffLevel


class TiledReader(BaseReader):
    """One handle on the file for all threads, and a source that decodes."""

    def __init__(self, info: SlideInfo, facts: TiffFacts, source: Source) -> None:
        super().__init__(info)
        self._levels = facts.levels
        self._tables = {level.tables: jpeg_tables(level.tables) for level in facts.levels}
        self._source = source
        self._file = os.open(info.path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, level: int, xy: Int64, size: int, out: UInt8) -> UInt8:
        """See `SlideReader.read`."""
        return self.band(level, [(xy, size)]).read(xy, size, out)

    def band(self, level: int, asked: Sequence[tuple[Int64, int]]) -> Band:
        """See `SlideReader.band`."""

        def decode(tiles: Sequence[int], spare: list[Any]) -> list[SourceTile]:
            return self._decode(level, tiles, spare)

        return Band(self._levels[level], decode, asked, self._source.at_once)

    def close(self) -> None:
        """Free the handles on the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._source.close()

    def _decode(self, level: int, tiles: Sequence[int], spare: list[Any]) -> list[SourceTile]:
        facts = self._levels[level]
        made: list[SourceTile] = []
        whole: list[int] = []
        contents: list[bytes] = []
        for number in tiles:
            data, status = self._bytes(facts, number)
            made.append(SourceTile(status=status))
            if status == TileStatus.OK:
                whole.append(number)
                contents.append(data)
        decoded = iter(self._source.decode(level, whole, contents, spare) if whole else ())
        for tile in made:
            if tile.status == TileStatus.OK:
                tile.pixels, tile.buffer = next(decoded)
                if tile.pixels is None:
                    tile.status = TileStatus.FAILED
        return made

    def _bytes(self, level: TiffLevel, tile: int) -> tuple[bytes, TileStatus]:
        """A source tile's bytes and whether they can be a whole image."""
        count = int(level.counts[tile])
        if count == 0:
            return b"", TileStatus.MISSING
        pixels = level.tile[0] * level.tile[1]
        # no codec grows so much; bounds what is read into memory
        if count > 16 * pixels + 65_536:
            return b"", TileStatus.CORRUPT
        data = os.pread(self._file, count, int(level.offsets[tile]))
        if level.compression == UNCOMPRESSED:
            whole = len(data) == 3 * pixels
        else:
            whole = len(data) == count and (
                whole_jpeg(data, level.tile, self._tables[level.tables])
                if level.compression == JPEG
                else whole_jpeg2000(data, level.tile)
            )
        return data, TileStatus.OK if whole else TileStatus.CORRUPT
