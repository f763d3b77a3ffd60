"""cuCIM, for the tiled TIFFs that it is known to read right."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hmil_fast.io.slide.base import WHITE, BaseReader
from hmil_fast.io.slide.codestream import whole_jpeg, whole_jpeg2000
from hmil_fast.io.slide.protocol import Int64, SlideInfo, TileStatus, UInt8
from hmil_fast.io.slide.tiff_facts import CODECS, TiffFacts, TiffLevel

STRIP = 8  # neighbouring tiles decoded together, so that an unaligned grid decodes less twice
_UNKNOWN = 255
# uncompressed, JPEG, JPEG 2000; a corrupt LZW tile becomes garbage without a word
_READS = frozenset((1, 7, 33003, 33005))
_PLUGIN_SWITCHES = ("ENABLE_CUSLIDE2", "CUCIM_PLUGINS")


def _import() -> Any:
    """The class CuImage with its plugin loaded, or why there is none."""
    # cuCIM and its plugin each start libcufile if torch has loaded it, and on a kernel without
    # /proc/modules libcufile never returns from its start: there both must come before torch
    if "torch" in sys.modules and "cucim" not in sys.modules and not Path("/proc/modules").exists():
        return "torch was imported before it, which hangs on a kernel without /proc/modules"
    try:
        from cucim.clara import CuImage
    except ImportError:
        return "not installed"
    with suppress(ValueError, RuntimeError):
        CuImage("/nowhere.tif")  # loads the plugin
    return CuImage


_CUIMAGE = _import()


class Unsuited(Exception):
    """cuCIM is not to be used for this file, and why."""


def why_not(facts: TiffFacts | None, suffix: str) -> str | None:
    """Why cuCIM is not asked to open a file, or None where it may."""
    if facts is None:
        return "not a tiled TIFF"
    if suffix not in (".svs", ".tif", ".tiff"):
        return f"it goes by extension and does not know {suffix or 'a name without one'}"
    if facts.vendor not in ("aperio", "generic-tiff"):
        return f"it does not read {facts.vendor} files"
    if facts.sub_pyramid:
        return "the pyramid lies in SubIFDs"
    for level in facts.levels:
        if not level.plain_rgb:
            return "not 8-bit interleaved RGB"
        if level.compression not in _READS:
            codec = CODECS.get(level.compression, level.compression)
            return f"it is not trusted with {codec}"
        if level.predictor != 1:
            return f"it is not trusted with predictor {level.predictor}"
    return None


class CucimReader(BaseReader):
    """Single reads by the default plugin, which frees the GIL, from any number of threads."""

    def __init__(self, info: SlideInfo, facts: TiffFacts) -> None:
        """Open.

        Raises:
            Unsuited: cuCIM is not installed, refuses the file or sees other levels in it.
        """
        super().__init__(info)
        self._levels = facts.levels
        self._slide = _open(info)
        seen = self._slide.resolutions
        if tuple(map(tuple, seen["level_dimensions"])) != info.level_dimensions:
            self._slide.close()
            raise Unsuited(f"it sees levels {seen['level_dimensions']}")
        self._downsamples = [np.float32(d) for d in seen["level_downsamples"]]
        self._checked = [np.full(len(level.offsets), _UNKNOWN, np.uint8) for level in facts.levels]
        self._file = os.open(info.path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, level: int, xy: Int64, size: int, out: UInt8) -> UInt8:
        """See `SlideReader.read`."""
        status = self._source_status(level, xy, size)
        good = np.flatnonzero(status == TileStatus.OK)
        out[status != TileStatus.OK] = WHITE
        at = 0
        while at < len(good):
            row = good[at]
            run = 1
            while (
                run < STRIP
                and at + run < len(good)
                and good[at + run] == row + run
                and xy[row + run, 1] == xy[row, 1]
                and xy[row + run, 0] == xy[row, 0] + run * size
            ):
                run += 1
            if not self._decode(level, xy[row], size, out[row : row + run]):
                for single in range(row, row + run):
                    if run == 1 or not self._decode(
                        level, xy[single], size, out[single : single + 1]
                    ):
                        out[single] = WHITE
                        status[single] = TileStatus.FAILED
            at += run
        return status

    def close(self) -> None:
        """Free both handles on the file."""
        if self._file >= 0:
            os.close(self._file)
            self._slide.close()
            self._file = -1

    def _decode(self, level: int, corner: Int64, size: int, out: UInt8) -> bool:
        """Read a strip of len(out) tiles from `corner` on; whether that worked."""
        wide, high = self._info.level_dimensions[level]
        left, top = int(corner[0]), int(corner[1])
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + size * len(out), wide), min(top + size, high)
        if x0 >= x1 or y0 >= y1:
            out[:] = WHITE
            return True
        try:
            region = self._slide.read_region(
                [self._location(x0, level), self._location(y0, level)], [x1 - x0, y1 - y0], level
            )
            pixels = np.asarray(region)
        except (RuntimeError, ValueError):
            return False
        if pixels.shape != (y1 - y0, x1 - x0, 3):
            return False
        for number, tile in enumerate(out):
            edge = left + number * size
            a, b = max(edge, x0), min(edge + size, x1)
            if (a, b, y0, y1) != (edge, edge + size, top, top + size):
                tile[:] = WHITE
            if a < b:
                tile[y0 - top : y1 - top, a - edge : b - edge] = pixels[:, a - x0 : b - x0]
        return True

    def _location(self, at: int, level: int) -> int:
        """The level-0 px that cuCIM, which truncates in float32, takes for px `at` of a level."""
        down = self._downsamples[level]
        place = int(np.ceil(at * np.float64(down)))
        while int(np.float32(place) / down) < at:
            place += 1
        return place

    def _source_status(self, level: int, xy: Int64, size: int) -> UInt8:
        """uint8 [n]: the worst status of the source tiles that each tile touches."""
        facts, known = self._levels[level], self._checked[level]
        across = facts.grid[0]
        first = np.maximum(xy, 0) // facts.tile
        last = (np.minimum(xy + size, facts.size) - 1) // facts.tile
        status = np.zeros(len(xy), np.uint8)
        for n, ((x0, y0), (x1, y1)) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            for y in range(y0, y1 + 1):
                for x in range(x0, x1 + 1):
                    source = y * across + x
                    if known[source] == _UNKNOWN:
                        known[source] = self._check(facts, source)
                    status[n] = max(status[n], known[source])
        return status

    def _check(self, level: TiffLevel, source: int) -> TileStatus:
        count = int(level.counts[source])
        if count == 0:
            return TileStatus.MISSING
        if level.compression == 1:
            whole = count == level.tile[0] * level.tile[1] * 3
            return TileStatus.OK if whole else TileStatus.CORRUPT
        if count > 16 * level.tile[0] * level.tile[1] + 65_536:
            return TileStatus.CORRUPT  # no codec grows so much; bounds what is read into memory
        data = os.pread(self._file, count, int(level.offsets[source]))
        whole = (whole_jpeg if level.compression == 7 else whole_jpeg2000)(data, level.tile)
        return TileStatus.OK if whole and len(data) == count else TileStatus.CORRUPT


def _open(info: SlideInfo) -> Any:
    switch = next((name for name in _PLUGIN_SWITCHES if os.environ.get(name)), None)
    if switch is not None:
        raise Unsuited(f"{switch} is set, and only its default plugin is trusted")
    if isinstance(_CUIMAGE, str):
        raise Unsuited(_CUIMAGE)
    try:
        return _CUIMAGE(str(info.path))
    except (RuntimeError, ValueError) as error:
        raise Unsuited(" ".join(str(error).split())) from None
