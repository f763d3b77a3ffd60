"""Hold the state of one slide being extracted: write its features, keep its errors, commit it."""

import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmil_fast.errors import HmilError, SlideError
from hmil_fast.extraction.pictures import ContactSheet
from hmil_fast.extraction.pipeline.attributes import source
from hmil_fast.extraction.pipeline.result import SlideResult, explained
from hmil_fast.extraction.prepare import Prepared
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.store import SlideWriter
from hmil_fast.io.store.commit import nonfinite_rows
from hmil_fast.io.tiles.batch import DecodeStats
from hmil_fast.io.tiles.stain import IDENTITY

MAX_BAD_SHARE = 0.1  # a slide with more undecodable tiles is refused


class ActiveSlide:
    """One open slide, its writer and how far it is; an error is its own and no other slide's.

    Attributes:
        task: The slide.
        reader: Open until its last tile is decoded.
        grids: Its tiles, a grid for each scale; row i of a scale's features is tile i of its grid.
        num_tiles: Tiles of all scales.
        error: Why the slide has failed, or None.
        sheet: Some of its tiles, for people.
        ended: Whether no more of its tiles will come.
        density: What is done to the optical densities of all its tiles, affine [3, 4].
        views: Views of every tile beside the plain one; each has a row of its own.
        added: Rows that were put into batches so far.
        passed: Rows that have left the encoder so far, also those dropped after a failure.
    """

    def __init__(
        self,
        ready: Prepared,
        writer: SlideWriter,
        files: Mapping[str, bytes],
        sheet: ContactSheet,
        start: float,
    ) -> None:
        self.task: SlideTask = ready.task
        self.reader = ready.reader
        self.grids = ready.grids
        self._starts = np.cumsum([0, *(len(grid.coords) for grid in ready.grids)])
        self.num_tiles = int(self._starts[-1])
        self.error: HmilError | None = None
        self.sheet = sheet
        self.ended = False
        self.added = 0
        self.passed = 0
        self.density = ready.stain.matrix if ready.stain else IDENTITY
        self.views = writer.spec.views
        self._notes = ready.notes
        self._writer = writer
        self._files = dict(files)
        self._start = start
        self._decoding: dict[str, Any] = {}
        self._status = np.zeros(self.num_tiles, np.uint8)
        # scale, view and rows, in the order of decoding
        self._coming: deque[tuple[int, int, int]] = deque()

    def fail(self, error: Exception) -> None:
        """Give the slide up; the first error stays."""
        if self.error is None:
            self.error = explained(error, self.task.path)

    def decoded(self, scale: int, first: int, status: NDArray[np.uint8]) -> None:
        """Keep the status of a scale's tiles from row `first` on; their features come in order.

        Those of the plain tiles come first, then view by view.

        Raises:
            SlideError: More than a tenth of the slide's tiles are bad.
        """
        start = int(self._starts[scale]) + first
        self._status[start : start + len(status)] = status
        self._coming.extend((scale, view, len(status)) for view in range(1 + self.views))
        if status.any() and self.bad_tiles > MAX_BAD_SHARE * self.num_tiles:
            raise SlideError(
                f"slide {self.task.path}: at least {self.bad_tiles} of {self.num_tiles} tiles "
                "cannot be decoded",
                "copy the file again from its source, or leave it out",
            )

    def note_decoding(self, stats: DecodeStats) -> None:
        """Keep how its tiles were decoded, where a GPU was to do it."""
        if stats.refused:
            self._decoding = {"on": "cpu", "because": stats.refused}
            self._notes = (*self._notes, (f"a CPU decoded it: {stats.refused}", ""))
        elif stats.decoder:
            self._decoding = {
                "on": "gpu",
                "by": stats.decoder,
                "probe_difference": round(stats.probe_difference, 3),
                "tiles_on_cpu": stats.on_cpu,
            }

    @property
    def bad_tiles(self) -> int:
        """Tiles that could not be decoded so far."""
        return int(np.count_nonzero(self._status))

    def write(self, rows: NDArray[Any]) -> None:
        """Append the next rows, features [n, D] as the store takes them.

        Raises:
            SlideError: They are not finite.
            StoreError: The disk refuses.
        """
        spec = self._writer.spec
        if len(nonfinite_rows(rows, spec.dtype)):
            raise SlideError(
                f"features of encoder {spec.encoder.get('name')!r} are not finite in {spec.dtype}",
                "extract into a new --store with --dtype float32, or check the --weights",
            )
        while len(rows):
            scale, view, count = self._coming.popleft()
            self._writer.append(rows[:count], scale, view)
            if count > len(rows):
                self._coming.appendleft((scale, view, count - len(rows)))
            rows = rows[count:]

    def finish(self) -> SlideResult:
        """Commit the slide unless it has failed, and say what became of it; never raises."""
        if self.error is None:
            try:
                self._check_unchanged()
                coords = np.concatenate([grid.coords for grid in self.grids])
                parents = [grid.parent for grid in self.grids if grid.parent is not None]
                parent = np.concatenate(parents) if parents else None
                self.sheet.save()  # before the commit: a stored slide never counts as failed
                self._writer.attrs["bad_tiles"] = self.bad_tiles
                if self._decoding:
                    self._writer.attrs["decoded"] = self._decoding
                self._writer.commit(coords, self._status, self._files, parent)
            except Exception as error:  # noqa: BLE001  # the other slides of the job go on
                self.fail(error)
        if self.error is not None:
            self._writer.abort()
            return SlideResult(self.task.slide_id, error=self.error)
        seconds = time.perf_counter() - self._start
        return SlideResult(self.task.slide_id, self.num_tiles, self.bad_tiles, seconds, self._notes)

    def _check_unchanged(self) -> None:
        with suppress(OSError):  # it was read to its end; it may go
            if source(self.task.path) != self._writer.attrs["source"]:
                raise SlideError(
                    f"slide {self.task.path} changed while it was read",
                    "wait until it is copied, then run the same command again",
                )

    def abandon(self) -> None:
        """Delete what was written of a slide that will not be finished."""
        self._writer.abort()
