"""Define the slide reader's protocol: levels, scale and pixels of regions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from hmil_fast.errors import SlideError

UInt8 = NDArray[np.uint8]
Int64 = NDArray[np.int64]

# told the share that is done, and the px of the level that is read
Progress = Callable[[float, int], None]

Note = tuple[str, str]  # what the user should know, and what to do about it ("" if nothing)

PLAUSIBLE_MPP = (0.05, 20.0)


class TileStatus(IntEnum):
    """Why a tile is white: 0 is a good tile, everything else a bad one."""

    OK = 0
    CORRUPT = 1  # the file's bytes for it are not a whole JPEG or JPEG 2000 image
    FAILED = 3  # the decoder refused it; 2 is in older stores: the file holds no bytes for it


@dataclass(frozen=True, slots=True)
class SlideInfo:
    """The facts of one open slide.

    Attributes:
        path: The file.
        reader: "nvimagecodec", "cucim", "libjpeg-turbo", "raw" (pixels lie in the file as they
            are) or "openslide".
        vendor: "aperio", "generic-tiff", "hamamatsu", …
        codec: "jpeg", "jpeg2000", "lzw", "deflate", "none" or "unknown".
        level_dimensions: (width, height) of the pyramid's levels in px, finest first.
        level_tile_sizes: (width, height) of the file's own tiles per level in px.
        mpp: µm per level-0 px, or None where nothing states it.
        mpp_source: Where `mpp` was read, or why it is None.
        objective_power: Magnification of the scan, where stated.
        reader_reason: Why this reader, in a sentence.
        notes: What of the file is not read, or read otherwise than one may expect, each with what
            to do about it ("" if nothing).
    """

    path: Path
    reader: str
    vendor: str
    codec: str
    level_dimensions: tuple[tuple[int, int], ...]
    level_tile_sizes: tuple[tuple[int, int], ...]
    mpp: float | None
    mpp_source: str
    objective_power: float | None
    reader_reason: str = ""
    notes: tuple[Note, ...] = ()

    def level_mpp(self, level: int) -> float:
        """µm per px of a level: mpp of level 0 × W0 / Wl.

        Raises:
            SlideError: The slide states no plausible mpp.
        """
        return require_mpp(self) * self.level_dimensions[0][0] / self.level_dimensions[level][0]


class TileBand(Protocol):
    """Reads of one level that share what the file's own tiles hold."""

    def read(self, xy: Int64, size: int, out: UInt8) -> UInt8:
        """As `SlideReader.read`, for tiles that were announced; from several threads at once."""
        ...


class SlideReader(Protocol):
    """An open slide; `read` and `thumbnail` may be called from several threads at once."""

    @property
    def info(self) -> SlideInfo:
        """The slide's facts."""
        ...

    def read(self, level: int, xy: Int64, size: int, out: UInt8) -> UInt8:
        """Read square tiles into a slab.

        Args:
            level: Pyramid level.
            xy: int64 [n, 2], top-left corners in px of that level.
            size: Side of a tile in px of that level.
            out: uint8 [n, size, size, 3], C-contiguous; every byte is written. What lies outside
                the level, and the whole of a bad tile, is white.

        Returns:
            uint8 [n] of `TileStatus`. A bad tile never raises.
        """
        ...

    def band(self, level: int, asked: Sequence[tuple[Int64, int]]) -> TileBand:
        """Announce tiles, so that each of the file's own tiles is decoded once for all of them.

        Args:
            level: Pyramid level.
            asked: One or several grids as (xy, size), see `read`. Read each tile once, all grids
                from the top down together: what is decoded is kept until its last tile is read.
        """
        ...

    def thumbnail(self, max_px: int, progress: Progress | None = None) -> UInt8:
        """The whole slide, uint8 [h, w, 3], its longer side at most `max_px`.

        Args:
            max_px: The longer side.
            progress: Called often while a level is read that takes a second or more; what it raises
                ends the reading.

        Raises:
            SlideError: The smallest level that would do has over 137 gigapixels.
        """
        ...

    def close(self) -> None:
        """Free the file; no read may be under way."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def require_mpp(info: SlideInfo) -> float:
    """µm per level-0 px.

    Raises:
        SlideError: The slide states none, or one outside 0.05–20 µm/px.
    """
    low, high = PLAUSIBLE_MPP
    usual = "pass --slide-mpp 0.5 (its true µm per px)"
    if info.objective_power is not None and 1 <= info.objective_power <= 100:
        usual = (
            f"pass --slide-mpp {10 / info.objective_power:.3g} if its objective of "
            f"{info.objective_power:g}× has the usual scale"
        )
    if info.mpp is None:
        raise SlideError(
            f"{info.path.name} states no usable mpp ({info.mpp_source})",
            f"{usual}, or add an mpp column to the manifest",
        )
    if not (math.isfinite(info.mpp) and low <= info.mpp <= high):
        raise SlideError(
            f"{info.path.name} states {info.mpp:.4g} µm per px ({info.mpp_source}), "
            f"outside the plausible {low}–{high:g}",
            f"{usual}, or add an mpp column to the manifest",
        )
    return info.mpp
