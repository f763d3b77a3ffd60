"""The slides of a job as one of its processes sees them: which to take next, which others have."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hmil_fast.errors import HmilError, StoreError
from hmil_fast.extraction.jobs.events import EventLog, Failures
from hmil_fast.extraction.jobs.leases import Leases
from hmil_fast.extraction.jobs.watchdog import Watch
from hmil_fast.extraction.pipeline.extractor import Extractor
from hmil_fast.extraction.pipeline.result import SlideResult
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.store import FeatureStore

LEASE_SECONDS = 120.0
SLIDE_MINUTES = 30.0


@dataclass(frozen=True)
class TilesDone:
    """How far a slide is."""

    slide_id: str
    done: int
    total: int


@dataclass(frozen=True)
class SearchDone:
    """How far the search for a slide's tissue is, on a level of so many px."""

    slide_id: str
    share: float
    px: int


@dataclass(frozen=True)
class Elsewhere:
    """Another process has finished a slide."""

    slide_id: str


# what a process of a job says; a mapping are its seconds per stage, when it ends
Message = TilesDone | SearchDone | Elsewhere | SlideResult | dict[str, float]


def in_order(tasks: Sequence[SlideTask], shard: tuple[int, int] | None) -> list[SlideTask]:
    """The order to take slides in: the shard's own first, in both parts the largest first.

    The largest first, so that the last ones to end are small. A slide's shard follows from its id
    alone, so that it is the same in whatever order slides are named.

    Args:
        tasks: The slides of the whole job.
        shard: (i, n) with 1 ≤ i ≤ n.
    """
    index, count = shard or (1, 1)

    def key(task: SlideTask) -> tuple[bool, int]:
        digest = hashlib.sha256(task.slide_id.encode("utf-8", "surrogatepass")).digest()
        others = int.from_bytes(digest[:8], "big") % count != index - 1
        return others, -size(task.path)

    return sorted(tasks, key=key)


class WorkList:
    """Slides still to be done, taken under a lease; after the last one all are done or failed.

    Args:
        store: The store they go into.
        tasks: The slides, in the order to take them.
        seconds: After which the lease of a dead process ends.
        log: Where this process says what it does.
        emit: Told of each slide that another process finished, or that failed there.
    """

    def __init__(
        self,
        store: FeatureStore,
        tasks: Sequence[SlideTask],
        seconds: float,
        log: EventLog,
        emit: Callable[["Message"], None],
    ) -> None:
        self.store = store
        self.leases = Leases(store.path, seconds, lambda: log.alive("beat", seconds))
        self.failures = Failures(store.path)
        self.log = log
        self._left = {task.slide_id: task for task in tasks}
        self._emit = emit

    def take(self, ahead: bool) -> SlideTask | None:
        """The next slide, under a lease; waits for those that other processes work on.

        Args:
            ahead: To open it while another one is encoded: does not wait, and a slide on which
                a process has died is done by itself, so that it is known which one kills.

        Returns:
            None when nothing is left; with `ahead`, when nothing can be taken now.
        """
        if ahead and any(lease.deaths for lease in self.leases.held()):
            return None
        while True:
            # those on which a process died come last, so that they keep no other one waiting
            for fresh in (True,) if ahead else (True, False):
                for task in list(self._left.values()):
                    if self._claimed(task, fresh):
                        del self._left[task.slide_id]
                        self.log.write("slide start", slide_id=task.slide_id)
                        return task
            if ahead or not self._left:
                return None
            self._emit({})  # says nothing, but may stop us
            time.sleep(self.leases.pause)

    def finish(self, result: SlideResult) -> None:
        """Keep what became of a slide and give its lease back."""
        if result.error is None:
            self.failures.forget(result.slide_id)
            self.log.write(
                "slide done",
                slide_id=result.slide_id,
                num_tiles=result.num_tiles,
                bad_tiles=result.bad_tiles,
                seconds=round(result.seconds, 3),
                note="; ".join(what for what, _ in result.notes) or None,
            )
        else:
            self._fail(result.slide_id, result.error)
        self.leases.release(result.slide_id)

    def close(self) -> None:
        """Give back what is held."""
        self.leases.close()

    def _fail(self, slide_id: str, error: HmilError) -> None:
        self.failures.record(slide_id, error)
        self.log.write("slide failed", slide_id=slide_id, error=error.what, fix=error.fix)

    def _claimed(self, task: SlideTask, fresh: bool) -> bool:
        if self._is_settled(task):
            return False
        try:
            lease = self.leases.take(task.slide_id, fresh=fresh)
        except HmilError as error:
            self._fail(task.slide_id, error)
            self._settle(task, error)
            return False
        if lease is None:
            return False
        if self._is_settled(task):  # by one who gave its lease back just now
            self.leases.release(task.slide_id)
            return False
        return True

    def _is_settled(self, task: SlideTask) -> bool:
        error: HmilError | None
        try:
            if not self.store.is_done(task.slide_id):
                error = self.failures.since_start(task.slide_id)
                if error is None:
                    return False
            else:
                error = None
        except StoreError as problem:
            error = problem
        self._settle(task, error)
        return True

    def _settle(self, task: SlideTask, error: HmilError | None) -> None:
        del self._left[task.slide_id]
        slide_id = task.slide_id
        self._emit(SlideResult(slide_id, error=error) if error else Elsewhere(slide_id))


def work(
    extractor: Extractor,
    tasks: Sequence[SlideTask],
    lease_seconds: float,
    emit: Callable[[Message], None],
    wind_up: Watch = lambda busy: None,
) -> None:
    """Do slides of a job, beside whatever other processes do, until all are done or failed.

    Args:
        extractor: The warm encoder with its store.
        tasks: The job's slides, in the order to take them.
        lease_seconds: After which the lease of a dead process ends.
        emit: Told what happens.
        wind_up: Called after every step with whether this process holds slides; see `watch`.
    """
    log = EventLog(extractor.store.path)
    before: dict[str, int] = {}

    def take(ahead: bool) -> SlideTask | None:
        emit({})  # says nothing, but may stop us before the next slide
        task = slides.take(ahead)
        held = len(slides.leases.held())
        if held == 0 or (held == 1 and task is not None):  # one more is no step of those before it
            wind_up(held > 0)
        return task

    def on_tiles(task: SlideTask, done: int, total: int) -> None:
        wind_up(True)
        log.tiles += done - before.get(task.slide_id, 0)
        before[task.slide_id] = done
        emit(TilesDone(task.slide_id, done, total))

    def on_search(task: SlideTask, share: float, px: int) -> None:
        wind_up(True)
        emit(SearchDone(task.slide_id, share, px))

    device = str(extractor.encoder.device)
    log.alive("job start", lease_seconds, slides=len(tasks), device=device)
    slides = WorkList(extractor.store, tasks, lease_seconds, log, emit)
    try:
        for result in extractor.run_from(take, on_tiles, on_search):
            slides.finish(result)
            wind_up(bool(slides.leases.held()))
            before.pop(result.slide_id, None)
            emit(result)
        emit(dict(extractor.timings.seconds))
    finally:
        wind_up(False)
        slides.close()
        log.write("job end")


def size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
