"""Read slides with OpenSlide: every file that the tiled reader does not take."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hmil_fast.io.slide.base import WHITE, BaseReader
from hmil_fast.io.slide.protocol import Int64, SlideInfo, TileBand, TileStatus, UInt8
from hmil_fast.io.slide.source_tile_cache import MAX_BAND_BYTES
from hmil_fast.io.slide.tiff_facts import TiffFacts
from hmil_fast.io.slide.tiff_mpp import Scale, mean_mpp, number

OPENSLIDE_CACHE_BYTES = 32 * 2**20  # what it takes unless told otherwise


class OpenSlideReader(BaseReader):
    """One shared handle, replaced after an error (OpenSlide's handles stay broken after one)."""

    def __init__(self, path: Path, facts: TiffFacts | None, reason: str = "") -> None:
        """Open.

        Raises:
            openslide.OpenSlideError: It cannot open the file.
        """
        import openslide

        self._error: type[Exception] = openslide.OpenSlideError
        self._library = openslide
        self._cache: Any = None
        self._path = path
        self._slide: Any = self._open()
        self._renewing = threading.Lock()
        info, self._numbers = _info(path, self._slide, facts)
        super().__init__(replace(info, reader_reason=reason))

    def band(self, level: int, asked: Sequence[tuple[Int64, int]]) -> TileBand:
        """See `SlideReader.band`: OpenSlide's own cache, made to hold a row of source tiles."""
        wide, tile = self._info.level_dimensions[level][0], self._info.level_tile_sizes[level][1]
        rows = max((size for _, size in asked), default=0) + 2 * max(tile, 256)
        size = min(MAX_BAND_BYTES, 4 * wide * rows)
        with self._renewing:
            if size > OPENSLIDE_CACHE_BYTES and self._cache is None:
                self._cache = self._library.OpenSlideCache(size)
                self._slide.set_cache(self._cache)
        return _OpenSlideBand(self, level)

    def read(self, level: int, xy: Int64, size: int, out: UInt8) -> UInt8:
        """See `SlideReader.read`."""
        status = np.zeros(len(xy), np.uint8)
        for n, (x, y) in enumerate(xy.tolist()):
            out[n] = WHITE
            if not self._read_one(level, (x, y), size, out[n]):
                out[n] = WHITE
                status[n] = TileStatus.FAILED
        return status

    def close(self) -> None:
        """Free the file."""
        self._slide.close()

    def _open(self) -> Any:
        slide = self._library.OpenSlide(self._path)
        if self._cache is not None:
            slide.set_cache(self._cache)
        return slide

    def _read_one(self, level: int, corner: tuple[int, int], size: int, out: UInt8) -> bool:
        slide = self._slide
        try:
            self._paint(slide, level, corner, size, out)
        except self._error:
            pass
        else:
            return True
        # the error may be another thread's, on the shared handle: only a fresh one can tell
        with self._renewing:
            try:
                fresh = self._open()
                if self._slide is slide:
                    self._slide = fresh
                    fresh = self._open()
                self._paint(fresh, level, corner, size, out)
            except self._error:
                return False
            return True

    def _paint(
        self, slide: Any, level: int, corner: tuple[int, int], size: int, out: UInt8
    ) -> None:
        (full_w, full_h), (wide, high) = (
            self._info.level_dimensions[0],
            self._info.level_dimensions[level],
        )
        x0, y0 = max(corner[0], 0), max(corner[1], 0)
        x1, y1 = min(corner[0] + size, wide), min(corner[1] + size, high)
        if x0 >= x1 or y0 >= y1:
            return
        place = (2 * x0 * full_w + wide) // (2 * wide), (2 * y0 * full_h + high) // (2 * high)
        region = slide.read_region(place, self._numbers[level], (x1 - x0, y1 - y0))
        # Pillow's own conversions take a quarter of the time that NumPy's take on four channels
        if region.getchannel("A").getextrema()[0] < WHITE:
            white = Image.new("RGBA", region.size, (WHITE, WHITE, WHITE, WHITE))
            region = Image.alpha_composite(white, region)
        inside = out[y0 - corner[1] : y1 - corner[1], x0 - corner[0] : x1 - corner[0]]
        inside[:] = np.asarray(region.convert("RGB"))


class _OpenSlideBand:
    """Reads that share OpenSlide's cache."""

    def __init__(self, reader: OpenSlideReader, level: int) -> None:
        self._reader, self._level = reader, level

    def read(self, xy: Int64, size: int, out: UInt8) -> UInt8:
        """See `TileBand.read`."""
        return self._reader.read(self._level, xy, size, out)


def _info(path: Path, slide: Any, facts: TiffFacts | None) -> tuple[SlideInfo, list[int]]:
    """The slide's facts, and OpenSlide's numbers of its levels: all, or those that are levels."""
    props = slide.properties
    vendor = str(props.get("openslide.vendor", "unknown"))
    tiff = facts if facts is not None and vendor == facts.vendor and vendor != "hamamatsu" else None
    sizes = [(int(w), int(h)) for w, h in slide.level_dimensions]
    known = set(sizes) if tiff is None else {level.size for level in tiff.levels}
    levels = [n for n, size in enumerate(sizes) if n == 0 or size in known]
    scale = _scale(props, vendor) if tiff is None else tiff.scale
    info = SlideInfo(
        path=path,
        reader="openslide",
        vendor=vendor,
        codec=facts.codec if facts else "unknown",
        level_dimensions=tuple(sizes[n] for n in levels),
        level_tile_sizes=tuple(
            (
                int(props.get(f"openslide.level[{n}].tile-width", 0)),
                int(props.get(f"openslide.level[{n}].tile-height", 0)),
            )
            for n in levels
        ),
        mpp=scale.mpp,
        mpp_source=scale.source,
        objective_power=scale.power,
        notes=tiff.notes if tiff else (),
    )
    return info, levels


def _scale(props: Any, vendor: str) -> Scale:
    power = number(props.get("openslide.objective-power"))
    stated = [props.get(f"openslide.mpp-{axis}") for axis in ("x", "y")]
    given = [text for text in stated if text]
    if not given:
        return Scale(None, f"none in {vendor} metadata", power)
    values = [value for text in given if (value := number(text)) is not None]
    if len(values) < len(given) or min(values) <= 0:
        return Scale(None, f"openslide.mpp = {' and '.join(given)}", power)
    return Scale(*mean_mpp(values[0], values[-1], "openslide"), power)
