"""Open slides and decode their tiles in background threads, ahead of the encoder."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass

from hmil_fast.extraction.pipeline.slide_job import ActiveSlide
from hmil_fast.extraction.pipeline.timings import Timings
from hmil_fast.extraction.prepare import each_tenth
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.slide import Progress
from hmil_fast.io.tiles.batch import DecodeStats, TileBatch
from hmil_fast.io.tiles.grid import TileGrid

OPENERS = 2  # small slides that are opened at once, ahead of the one that is decoded
_QUEUED = 2  # batches that wait for the consumer; others fill the ring of the decoder


@dataclass(frozen=True, slots=True)
class Decoded:
    """Tiles of a slide, of one of its scales."""

    slide: ActiveSlide
    tiles: TileBatch

    @property
    def grid(self) -> TileGrid:
        """The scale's grid."""
        return self.slide.grids[self.tiles.grid]


@dataclass(frozen=True, slots=True)
class Ended:
    """No more tiles of a slide will come; `slide` is None where it could not be opened."""

    task: SlideTask
    slide: ActiveSlide | None
    error: Exception | None


@dataclass(frozen=True, slots=True)
class Searching:
    """The tissue of a slide is looked for: the share that is done of a level's px."""

    task: SlideTask
    share: float
    px: int


@dataclass(slots=True)
class _Entry:
    task: SlideTask
    opening: Future[ActiveSlide]
    begun: bool = False
    got: int = 0


class TileFeed:
    """Opens slides in threads of their own, decodes one after the other, and hands out the tiles.

    The consumer is one thread; it must release every batch of tiles.

    Args:
        open_slide: Opens a slide; called in a thread.
        decode: Decodes its tiles, as `decode_tiles` does; called in the feed's thread.
        timings: Takes "decode (threads)".
    """

    def __init__(
        self,
        open_slide: Callable[[SlideTask, Progress], ActiveSlide],
        decode: Callable[[ActiveSlide, DecodeStats], Generator[TileBatch, None, None]],
        timings: Timings,
    ) -> None:
        self._open, self._decode_tiles = open_slide, decode
        self._timings = timings
        self._entries: deque[_Entry] = deque()
        self._todo: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._out: queue.Queue[Decoded | Searching | Ended] = queue.Queue(_QUEUED)
        self._stopped = False
        self._openers = started(OPENERS, "open-slide")
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def add(self, task: SlideTask) -> None:
        """Extract this slide after those before it."""
        entry = _Entry(task, self._openers.submit(self._open, task, self._progress(task)))
        self._entries.append(entry)
        self._todo.put(entry)

    def ahead(self) -> tuple[int, int]:
        """Slides that are not open yet, and tiles still to come of those that are."""
        closed = tiles = 0
        for entry in self._entries:
            if not entry.opening.done():
                closed += 1
            elif entry.opening.exception() is None:
                tiles += entry.opening.result().num_tiles - entry.got
        return closed, tiles

    @property
    def empty(self) -> bool:
        """Whether nothing is to come."""
        return not self._entries

    def get(self) -> Decoded | Searching | Ended:
        """The next tiles, or the end of a slide; slides come in the order they were added.

        Between them comes how far the opening of a large slide without small levels is.
        """
        item = self._out.get()
        if isinstance(item, Ended):
            self._entries.popleft()
        elif isinstance(item, Decoded):
            self._entries[0].got += len(item.tiles.pixels)
        return item

    def close(self) -> None:
        """End all threads and close the slides that have not ended."""
        self._stopped = True
        self._openers.shutdown(wait=False, cancel_futures=True)
        self._todo.put(None)
        while self._thread.is_alive():
            try:
                item = self._out.get(timeout=0.02)
            except queue.Empty:
                continue
            if isinstance(item, Decoded):
                item.tiles.release()
        self._openers.shutdown(wait=True)
        for entry in self._entries:
            done = not entry.opening.cancelled() and entry.opening.exception() is None
            if done and not entry.begun:
                entry.opening.result().reader.close()

    def _progress(self, task: SlideTask) -> Progress:
        """Tells each tenth of a slide's search for tissue, and ends it when we are closed."""

        def tell(share: float, px: int) -> None:
            with suppress(queue.Full):  # never waits: nobody may be left to take it
                self._out.put_nowait(Searching(task, share, px))

        passed_on = each_tenth(tell)

        def progress(share: float, px: int) -> None:
            if self._stopped:
                raise CancelledError
            passed_on(share, px)

        return progress

    def _run(self) -> None:
        while (entry := self._todo.get()) is not None and not self._stopped:
            slide, problem = None, None
            try:
                slide = entry.opening.result()
                entry.begun = True
                with slide.reader:
                    self._decode(slide)
            except Exception as error:  # noqa: BLE001  # one slide's, not the job's
                problem = error
            self._out.put(Ended(entry.task, slide, problem))

    def _decode(self, slide: ActiveSlide) -> None:
        if not slide.num_tiles:
            return
        stats = DecodeStats()
        # closed whatever happens: its threads read the slide, which is closed next
        with closing(self._decode_tiles(slide, stats)) as batches:
            for tiles in batches:
                slide.sheet.look(tiles.grid, tiles.rows, tiles.pixels, tiles.status)
                self._out.put(Decoded(slide, tiles))
                if self._stopped or slide.error is not None:
                    break
        slide.note_decoding(stats)
        self._timings.add("decode (threads)", stats.busy_s)


def started(threads: int, name: str) -> ThreadPoolExecutor:
    """An executor whose threads all run already.

    One that a signal's exception strikes while it starts a thread does not know of that thread, and
    its shutdown does not wait for it.
    """
    pool, met = ThreadPoolExecutor(threads, thread_name_prefix=name), threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(met.wait)
    met.wait()
    return pool
