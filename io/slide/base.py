"""Base class of the readers: padding, the thumbnail, the context manager."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image

from hmil_fast.errors import SlideError
from hmil_fast.io.slide.protocol import Int64, Progress, SlideInfo, TileBand, UInt8

WHITE = 255
UNREAD = 128
BLOCK_PX = 512
PIECE_PX = 128
MAX_PIECED = 64  # bad blocks that are read piece by piece, each of which may open the file anew
MAX_SHRINK = 32
LARGE_PX = 2**28  # a level that takes a second or more to read
MAX_PX = 2**37  # a level that takes many minutes on any machine


def cpus() -> int:
    """CPUs that this process may use, which a scheduler may have made fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 2


class BaseReader:
    """A reader but for `read` and `close`."""

    def __init__(self, info: SlideInfo) -> None:
        self._info = info

    @property
    def info(self) -> SlideInfo:
        """The slide's facts."""
        return self._info

    def replace_info(self, info: SlideInfo) -> None:
        """Take the user's word over the file's."""
        self._info = info

    def read(self, level: int, xy: Int64, size: int, out: UInt8) -> UInt8:
        """See `SlideReader.read`."""
        raise NotImplementedError

    def band(self, level: int, asked: Sequence[tuple[Int64, int]]) -> TileBand:
        """See `SlideReader.band`."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the file."""
        raise NotImplementedError

    def thumbnail(self, max_px: int, progress: Progress | None = None) -> UInt8:
        """See `SlideReader.thumbnail`.

        It is made of the coarsest level that is large enough, block by block and box-filtered, so
        that a slide of a single huge level needs no huge buffer; the blocks of a large one are read
        by all CPUs. What cannot be read is grey, which counts as tissue: white would take good
        tiles, and the count of bad ones, silently out of the job.
        """
        width, height = self._info.level_dimensions[0]
        scale = min(1.0, max_px / max(width, height))
        target = max(1, round(width * scale)), max(1, round(height * scale))
        level = max(
            (
                n
                for n, (w, h) in enumerate(self._info.level_dimensions)
                if w >= target[0] and h >= target[1]
            ),
            default=0,
        )
        wide, high = self._info.level_dimensions[level]
        if wide * high > MAX_PX:
            raise SlideError(
                f"{self._info.path.name} has no level smaller than {wide:,} × {high:,} px to find "
                "its tissue on",
                "add a pyramid to it, for instance by `vips tiffsave IN OUT.tif --tile --pyramid "
                "--bigtiff --compression jpeg`",
            )
        shrink = min(MAX_SHRINK, max(1, min(wide // target[0], high // target[1])))
        block = BLOCK_PX // shrink * shrink
        canvas = np.full((-(-high // shrink), -(-wide // shrink), 3), WHITE, np.uint8)
        rows = [[(x, y) for x in range(0, wide, block)] for y in range(0, high, block)]
        corners = np.array([corner for row in rows for corner in row], np.int64)
        band = self.band(level, [(corners, block)])

        bad: list[tuple[int, int]] = []

        def put(corner: tuple[int, int], pixels: UInt8) -> None:
            x, y = corner
            small = pixels[: high - y, : wide - x]
            if shrink > 1:
                small = np.asarray(Image.fromarray(small).reduce(shrink))
            canvas[y // shrink :, x // shrink :][: small.shape[0], : small.shape[1]] = small

        def read(corner: tuple[int, int]) -> None:
            buffer = np.empty((1, block, block, 3), np.uint8)
            if band.read(np.array([corner], np.int64), block, buffer)[0]:
                bad.append(corner)
                buffer[:] = UNREAD
            put(corner, buffer[0])

        if wide * high < LARGE_PX:
            for row in rows:
                for corner in row:
                    read(corner)
        else:
            with ThreadPoolExecutor(min(16, cpus())) as pool:
                for n, row in enumerate(rows):
                    if progress is not None:
                        progress(n / len(rows), wide * high)
                    list(pool.map(read, row))
        for corner in sorted(bad)[:MAX_PIECED]:
            put(corner, self._pieces(level, corner, block))
        covered = (0, 0, wide / shrink, high / shrink)  # the last block may be a part of one
        return np.asarray(Image.fromarray(canvas).resize(target, Image.Resampling.BOX, covered))

    def _pieces(self, level: int, corner: tuple[int, int], block: int) -> UInt8:
        """A bad block, uint8 [block, block, 3], with what of it is good."""
        out = np.empty((block, block, 3), np.uint8)
        piece = np.empty((1, PIECE_PX, PIECE_PX, 3), np.uint8)
        for y in range(0, block, PIECE_PX):
            for x in range(0, block, PIECE_PX):
                at = np.array([[corner[0] + x, corner[1] + y]], np.int64)
                if self.read(level, at, PIECE_PX, piece)[0]:
                    piece[:] = UNREAD
                part = out[y : y + PIECE_PX, x : x + PIECE_PX]
                part[:] = piece[0, : part.shape[0], : part.shape[1]]
        return out

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
