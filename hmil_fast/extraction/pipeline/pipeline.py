"""Run tiles through feed, transform, encoder and store, in batches across slides."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor

from hmil_fast.extraction.pipeline.batches import Parts, StaticBatches
from hmil_fast.extraction.pipeline.feed import OPENERS, Decoded, Ended, Searching, TileFeed, started
from hmil_fast.extraction.pipeline.result import SlideResult, explained
from hmil_fast.extraction.pipeline.slide_job import ActiveSlide
from hmil_fast.extraction.pipeline.timings import Timings
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.slide import Progress
from hmil_fast.io.tiles.batch import DecodeStats, TileBatch
from hmil_fast.streams import Event

_WRITES = 2  # batches on their way from the encoder to the writers
_COMMITS = 4  # slides that are committed at once, each with a shard in memory


class Steps(Protocol):
    """What is done to slides and tiles; the pipeline decides when, and in which thread."""

    batch: int
    timings: Timings

    def open(self, task: SlideTask, progress: Progress) -> ActiveSlide:
        """Open a slide and its writer; in a thread."""
        ...

    def decode(self, slide: ActiveSlide, stats: DecodeStats) -> Generator[TileBatch, None, None]:
        """Decode its tiles; in a thread."""
        ...

    def transform(self, decoded: Decoded, part: slice, view: int) -> Tensor:
        """Encoder input [n, 3, px, px] of some of the tiles, in one of their views."""
        ...

    def encode(self, tiles: Tensor) -> Callable[[], NDArray[Any]]:
        """Start a batch; the call, in a thread, gives its features [n, D]."""
        ...


class Pipeline:
    """One run over slides.

    Args:
        steps: What is done.
        batch: The encoder's input.
        on_tiles: Called after every batch with each of its slides, the tiles done, those in all.
        on_search: Called now and then with a slide whose tissue is looked for, see `Searching`.
    """

    def __init__(
        self,
        steps: Steps,
        batch: StaticBatches,
        on_tiles: Callable[[SlideTask, int, int], None],
        on_search: Callable[[SlideTask, float, int], None],
    ) -> None:
        self._steps, self._batch = steps, batch
        self._on_tiles, self._on_search = on_tiles, on_search
        self._timings = steps.timings
        self._feed = TileFeed(self._open, steps.decode, steps.timings)
        self._writer = started(1, "write")
        self._committer = started(2, "commit")
        # from the thread that opens a slide to the one that commits it: a signal, which strikes
        # the driving thread between any two steps, loses none
        self._unfinished: set[ActiveSlide] = set()
        self._writes: deque[tuple[Parts, Future[None]]] = deque()
        self._commits: deque[Future[SlideResult]] = deque()
        self._last_slide: int | None = None

    def run(self, take: Callable[[bool], SlideTask | None]) -> Iterator[SlideResult]:
        """Extract slides until `take` gives none, also when it may wait for one.

        A slide that waits with a part of its rows for others to fill the batch is still ours:
        before `take` waits, what is there is finished, so that no two processes wait for each
        other's slides.
        """
        may_ask = True
        while True:
            while may_ask and self._wants_more():
                task = take(True)
                may_ask = task is not None
                if task is not None:
                    self._feed.add(task)
            if self._feed.empty:
                yield from self._finish_all()
                task = take(False)
                if task is None:
                    return
                self._feed.add(task)
                may_ask = True
                continue
            with self._timings.of("wait for tiles"):
                item = self._feed.get()
            if isinstance(item, Decoded):
                self._add(item)
            elif isinstance(item, Searching):
                self._on_search(item.task, item.share, item.px)
            elif item.slide is None:
                assert item.error is not None
                error = explained(item.error, item.task.path)
                yield SlideResult(item.task.slide_id, error=error)
            else:
                self._end(item, item.slide)
            yield from self._results(_COMMITS)

    def close(self) -> None:
        """End all threads and delete what belongs to slides that are not finished."""
        self._feed.close()
        self._writer.shutdown(wait=True, cancel_futures=True)
        self._committer.shutdown(wait=True)
        for slide in self._unfinished:
            slide.abandon()

    def _open(self, task: SlideTask, progress: Progress) -> ActiveSlide:
        slide = self._steps.open(task, progress)
        self._unfinished.add(slide)
        return slide

    def _wants_more(self) -> bool:
        """Whether it is time for another slide: late in a long one, early among short ones.

        A slide taken is one that no other process can take.
        """
        few, last = 4 * self._steps.batch, self._last_slide
        closed, tiles = self._feed.ahead()
        most = OPENERS if last is not None and last <= few else 1
        return closed < most and tiles <= max((last or 0) // 4, few)

    def _add(self, decoded: Decoded) -> None:
        slide, tiles = decoded.slide, decoded.tiles
        self._last_slide = slide.num_tiles
        try:
            slide.decoded(tiles.grid, tiles.rows, tiles.status)
            for view in range(1 + slide.views):
                at = 0
                while at < len(tiles.pixels) and slide.error is None:
                    part = slice(at, min(at + self._batch.room, len(tiles.pixels)))
                    with self._timings.of("transform"):
                        with self._batch.stream.use():
                            made = self._steps.transform(decoded, part, view)
                        self._batch.add(slide, made)
                    at = part.stop
                    if not self._batch.room:
                        self._encode()
        except Exception as error:  # noqa: BLE001  # one slide's, not the job's
            slide.fail(error)
        finally:
            self._release(tiles)

    def _release(self, tiles: TileBatch) -> None:
        """Give a slab back once the device has read it; the host goes on meanwhile."""
        read = self._batch.stream.record()
        if read.query():
            tiles.release()
        else:  # behind the writes of batches before, which end no later
            self._writer.submit(_release_after, read, tiles)

    def _end(self, item: Ended, slide: ActiveSlide) -> None:
        self._last_slide = slide.num_tiles
        slide.ended = True
        if item.error is not None:
            slide.fail(item.error)
        self._commit_if_done(slide)

    def _encode(self) -> None:
        with self._batch.taken() as (tiles, parts):
            try:
                with self._timings.of("encode"):
                    back = self._steps.encode(tiles)
            except Exception as error:  # noqa: BLE001  # of the slides in this batch
                for slide, _ in parts:
                    slide.fail(error)
                self._passed(parts)
            else:
                self._writes.append((parts, self._writer.submit(self._write, parts, back)))
        self._collect(_WRITES)

    def _write(self, parts: Parts, back: Callable[[], NDArray[Any]]) -> None:
        try:
            rows = back()
        except Exception as error:  # noqa: BLE001  # a CUDA error turns up here
            for slide, _ in parts:
                slide.fail(error)
            return
        at = 0
        for slide, count in parts:
            try:
                if slide.error is None:
                    with self._timings.of("write (threads)"):
                        slide.write(rows[at : at + count])
            except Exception as error:  # noqa: BLE001  # one slide's
                slide.fail(error)
            at += count

    def _collect(self, most: int) -> None:
        """Take note of batches that are written, waiting for all but `most` of them."""
        while self._writes and (self._writes[0][1].done() or len(self._writes) > most):
            parts, future = self._writes.popleft()
            with self._timings.of("wait for the writer"):
                future.result()
            self._passed(parts)

    def _passed(self, parts: Parts) -> None:
        for slide, count in parts:
            slide.passed += count
            if slide.error is None:
                self._on_tiles(slide.task, slide.passed // (1 + slide.views), slide.num_tiles)
            self._commit_if_done(slide)

    def _commit_if_done(self, slide: ActiveSlide) -> None:
        if slide.ended and slide.passed == slide.added:
            self._commits.append(self._committer.submit(self._commit, slide))

    def _commit(self, slide: ActiveSlide) -> SlideResult:
        with self._timings.of("commit (threads)"):
            result = slide.finish()
        self._unfinished.discard(slide)
        return result

    def _results(self, most: int) -> Iterator[SlideResult]:
        while self._commits and (self._commits[0].done() or len(self._commits) > most):
            with self._timings.of("wait for commits"):
                result = self._commits.popleft().result()
            yield result

    def _finish_all(self) -> Iterator[SlideResult]:
        if self._batch.room < self._steps.batch:
            self._encode()
        self._collect(0)
        yield from self._results(0)


def _release_after(read: Event, tiles: TileBatch) -> None:
    try:
        read.synchronize()
    finally:
        tiles.release()
