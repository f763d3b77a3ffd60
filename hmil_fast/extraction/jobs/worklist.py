"""Run one worker of an extraction job: take slides under leases, extract them, record results."""

import hashlib
import time
from collections.abc import Callable, Sequence

from hmil_fast.errors import HmilError, StoreError
from hmil_fast.extraction.jobs.events import EventLog, Failures
from hmil_fast.extraction.jobs.leases import Leases
from hmil_fast.extraction.jobs.messages import Elsewhere, Message, SearchDone, TilesDone
from hmil_fast.extraction.jobs.watchdog import Watchdog
from hmil_fast.extraction.pipeline.extractor import Extractor
from hmil_fast.extraction.pipeline.result import SlideResult
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.store import FeatureStore

LEASE_SECONDS = 120.0


def in_order(tasks: Sequence[SlideTask], shard: tuple[int, int] | None) -> list[SlideTask]:
    """The order in which to extract slides: those of the shard first, in both parts by size.

    The largest come first, so that the last ones to end are small. A slide's shard depends on its
    id alone, not on the order in which slides are named.

    Args:
        tasks: The slides of the whole job.
        shard: (i, n) with 1 ≤ i ≤ n.
    """
    index, count = shard or (1, 1)

    def key(task: SlideTask) -> tuple[bool, int]:
        digest = hashlib.sha256(task.slide_id.encode("utf-8", "surrogatepass")).digest()
        others = int.from_bytes(digest[:8], "big") % count != index - 1
        return others, -task.file_bytes

    return sorted(tasks, key=key)


class WorkList:
    """Slides of the job that are not stored yet; this process takes each one under a lease.

    Args:
        store: The store.
        tasks: The slides, in the order to take them.
        seconds: A lease that was not touched for this long is dead.
        log: The event log of this process.
        emit: Called with each slide that another process has stored, or on which it failed.
    """

    def __init__(
        self,
        store: FeatureStore,
        tasks: Sequence[SlideTask],
        seconds: float,
        log: EventLog,
        emit: Callable[[Message], None],
    ) -> None:
        self.store = store
        self.leases = Leases(store.path, seconds, lambda: log.alive("beat", seconds))
        self.failures = Failures(store.path)
        self.log = log
        self._left = {task.slide_id: task for task in tasks}
        self._emit = emit

    def take(self, ahead: bool) -> SlideTask | None:
        """Take the next slide under a lease; wait for slides that other processes work on.

        Args:
            ahead: Take it to open it while another one is encoded: do not wait, and take no second
                slide beside one on which a process has died, so that a crash has one cause.

        Returns:
            The slide. None if no slide is left or, with `ahead`, if none can be taken now.
        """
        if ahead and any(lease.deaths for lease in self.leases.held()):
            return None
        while True:
            # slides on which a process died come last, so that no other slide waits for them
            for fresh in (True,) if ahead else (True, False):
                for task in list(self._left.values()):
                    if self._claimed(task, fresh):
                        del self._left[task.slide_id]
                        self.log.write("slide start", slide_id=task.slide_id)
                        return task
            if ahead or not self._left:
                return None
            self._emit({})  # an empty message: raises if the job was stopped
            time.sleep(self.leases.pause)

    def finish(self, result: SlideResult) -> None:
        """Record the result of a slide and release its lease."""
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
        """Release all leases."""
        self.leases.close()

    def _fail(self, slide_id: str, error: HmilError) -> None:
        self.failures.record(slide_id, error)
        self.log.write("slide failed", slide_id=slide_id, error=error.what, fix=error.fix)

    def _claimed(self, task: SlideTask, fresh: bool) -> bool:
        if self._is_done_or_failed(task):
            return False
        try:
            lease = self.leases.take(task.slide_id, fresh=fresh)
        except HmilError as error:
            self._fail(task.slide_id, error)
            self._remove(task, error)
            return False
        if lease is None:
            return False
        if self._is_done_or_failed(task):  # by a process that released its lease just now
            self.leases.release(task.slide_id)
            return False
        return True

    def _is_done_or_failed(self, task: SlideTask) -> bool:
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
        self._remove(task, error)
        return True

    def _remove(self, task: SlideTask, error: HmilError | None) -> None:
        del self._left[task.slide_id]
        slide_id = task.slide_id
        self._emit(SlideResult(slide_id, error=error) if error else Elsewhere(slide_id))


def work(
    extractor: Extractor,
    tasks: Sequence[SlideTask],
    lease_seconds: float,
    emit: Callable[[Message], None],
    watchdog: Watchdog = lambda busy: None,
) -> None:
    """Extract slides of a job, beside other processes, until all slides are stored or failed.

    Args:
        extractor: The extractor, its encoder loaded.
        tasks: The job's slides, in the order to take them.
        lease_seconds: A lease that was not touched for this long is dead.
        emit: Called with every message.
        watchdog: Called after every step, with whether this process holds slides.
    """
    log = EventLog(extractor.store.path)
    before: dict[str, int] = {}

    def take(ahead: bool) -> SlideTask | None:
        emit({})  # an empty message: raises if the job was stopped
        task = slides.take(ahead)
        held = len(slides.leases.held())
        if held == 0 or (
            held == 1 and task is not None
        ):  # opening one more is not progress of the others
            watchdog(held > 0)
        return task

    def on_tiles(task: SlideTask, done: int, total: int) -> None:
        watchdog(True)
        log.tiles += done - before.get(task.slide_id, 0)
        before[task.slide_id] = done
        emit(TilesDone(task.slide_id, done, total))

    def on_search(task: SlideTask, share: float, px: int) -> None:
        watchdog(True)
        emit(SearchDone(task.slide_id, share, px))

    device = str(extractor.encoder.device)
    log.alive("job start", lease_seconds, slides=len(tasks), device=device)
    slides = WorkList(extractor.store, tasks, lease_seconds, log, emit)
    try:
        for result in extractor.run_from(take, on_tiles, on_search):
            slides.finish(result)
            watchdog(bool(slides.leases.held()))
            before.pop(result.slide_id, None)
            emit(result)
        emit(dict(extractor.timings.seconds))
    finally:
        watchdog(False)
        slides.close()
        log.write("job end")
