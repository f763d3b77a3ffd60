"""Decode tiles of a TIFF with cuCIM, for the tiled TIFFs that it is known to decode correctly."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hmil_fast.io.slide.protocol import SlideInfo, UInt8
from hmil_fast.io.slide.sources import (
    JPEG,
    JPEG2000_RGB,
    UNCOMPRESSED,
    Decoded,
    Unsuited,
    tiled_rgb,
)
from hmil_fast.io.slide.tiff_facts import TiffFacts

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


class CucimSource:
    """Single reads by the default plugin, which frees the GIL, from any number of threads."""

    def __init__(self, info: SlideInfo, facts: TiffFacts) -> None:
        """Open.

        Raises:
            Unsuited: cuCIM is not installed, refuses the file or sees other levels in it.
        """
        # a corrupt LZW tile becomes garbage without a word
        tiled_rgb(facts, (UNCOMPRESSED, JPEG, JPEG2000_RGB))
        self._levels = facts.levels
        self._slide = _open(info)
        seen = self._slide.resolutions
        if tuple(map(tuple, seen["level_dimensions"])) != info.level_dimensions:
            self._slide.close()
            raise Unsuited(f"it sees levels {seen['level_dimensions']}")
        self._downsamples = [np.float32(d) for d in seen["level_downsamples"]]

    def decode(
        self, level: int, tiles: Sequence[int], data: Sequence[bytes], spare: list[Any]
    ) -> list[Decoded]:
        """See `Source.decode`."""
        return [Decoded(self._decode(level, tile)) for tile in tiles]

    def close(self) -> None:
        """Free its handle on the file."""
        self._slide.close()

    def _decode(self, level: int, tile: int) -> UInt8 | None:
        facts = self._levels[level]
        row, column = divmod(tile, facts.grid[0])
        x, y = column * facts.tile[0], row * facts.tile[1]
        wide, high = (
            min(t, s - at) for t, s, at in zip(facts.tile, facts.size, (x, y), strict=True)
        )
        try:
            region = self._slide.read_region(
                [self._location(x, level), self._location(y, level)], [wide, high], level
            )
            pixels = np.asarray(region)
        except (RuntimeError, ValueError):
            return None
        return pixels if pixels.shape == (high, wide, 3) and pixels.dtype == np.uint8 else None

    def _location(self, at: int, level: int) -> int:
        """The level-0 px that cuCIM, which truncates in float32, takes for px `at` of a level."""
        down = self._downsamples[level]
        place = int(np.ceil(at * np.float64(down)))
        while int(np.float32(place) / down) < at:
            place += 1
        return place


def _open(info: SlideInfo) -> Any:
    if info.path.suffix not in (".svs", ".tif", ".tiff"):
        extension = info.path.suffix or "a name without one"
        raise Unsuited(f"it goes by extension and does not know {extension}")
    switch = next((name for name in _PLUGIN_SWITCHES if os.environ.get(name)), None)
    if switch is not None:
        raise Unsuited(f"{switch} is set, and only its default plugin is trusted")
    if isinstance(_CUIMAGE, str):
        raise Unsuited(_CUIMAGE)
    try:
        return _CUIMAGE(str(info.path))
    except (RuntimeError, ValueError) as error:
        raise Unsuited(" ".join(str(error).split())) from None
