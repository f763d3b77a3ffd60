"""Gather the messages of a job's processes into its summary."""

import shlex
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hmil_fast.errors import SlideError, StoreError
from hmil_fast.extraction.jobs.events import save_job
from hmil_fast.extraction.jobs.messages import Elsewhere, JobStarted, Message, Notice, Report
from hmil_fast.extraction.pipeline.attributes import source
from hmil_fast.extraction.pipeline.result import SlideResult
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.store import FeatureStore
from hmil_fast.io.store.backend import backend_of


@dataclass(frozen=True)
class JobSummary:
    """What an extraction job has done.

    Attributes:
        store: The store.
        results: Results of the slides that this job extracted, or failed to, by slide id.
        done_before: Slides that were in the store before.
        elsewhere: Slides that other jobs stored meanwhile.
        seconds: Duration of the job.
        timings: Seconds by stage, over all processes; empty if they are not known.
        processes: Processes that worked on the job.
    """

    store: FeatureStore
    results: Mapping[str, SlideResult]
    done_before: int
    elsewhere: int
    seconds: float
    timings: Mapping[str, float]
    processes: int

    @property
    def failed(self) -> list[SlideResult]:
        """The slides that are not in the store, each with its error."""
        return [result for result in self.results.values() if result.error is not None]


class Collector:
    """Takes the messages of a job's processes, and passes them on to `report`.

    Args:
        store: The store.
        tasks: All slides of the job.
        report: Called with every event.

    Attributes:
        todo: The slides that are not in the store yet.
    """

    def __init__(self, store: FeatureStore, tasks: Sequence[SlideTask], report: Report) -> None:
        self.store = store
        save_job(store.path, [task.slide_id for task in tasks])
        self._done, self.todo, damaged = _split_done(store, tasks)
        self._results = {result.slide_id: result for result in damaged}
        self._elsewhere: set[str] = set()
        self._timings: defaultdict[str, float] = defaultdict(float)
        self._ended = 0
        self._report = report
        self._start = time.perf_counter()
        report(JobStarted(self.todo))

    def __call__(self, message: Message) -> None:
        """Take a message of a process."""
        if isinstance(message, dict):
            if message:
                self._ended += 1
                for stage, seconds in message.items():
                    self._timings[stage] += seconds
            return
        if isinstance(message, SlideResult):
            if message.slide_id in self._results:  # several workers learn that a slide failed
                return
            self._results[message.slide_id] = message
        elif isinstance(message, Elsewhere):
            self._elsewhere.add(message.slide_id)
        self._report(message)

    def note(self, text: str, level: str = "note") -> None:
        """Report a line of text."""
        self._report(Notice(text, level))

    def summary(self, processes: int) -> JobSummary:
        """Sum up the job once its processes have ended.

        Args:
            processes: Processes that were started; on a cluster more may have come.
        """
        for task in self.todo:
            if task.slide_id in self._results or task.slide_id in self._elsewhere:
                continue
            if self._is_stored(task.slide_id):  # its process died before it could report
                self._elsewhere.add(task.slide_id)
            else:
                error = SlideError(
                    f"slide {task.path} was not extracted: all processes of the job have ended",
                    "see above why they ended, then run the same command again",
                )
                self._results[task.slide_id] = SlideResult(task.slide_id, error=error)
        return JobSummary(
            self.store,
            self._results,
            len(self._done),
            len(self._elsewhere - self._results.keys()),
            time.perf_counter() - self._start,
            self._timings,
            max(processes, self._ended),
        )

    def _is_stored(self, slide_id: str) -> bool:
        try:
            return self.store.is_done(slide_id)
        except StoreError:
            return False


def _split_done(
    store: FeatureStore, tasks: Sequence[SlideTask]
) -> tuple[list[SlideTask], list[SlideTask], list[SlideResult]]:
    done: list[SlideTask] = []
    todo: list[SlideTask] = []
    failed: list[SlideResult] = []

    def look(task: SlideTask) -> bool | StoreError:
        try:
            finished = store.is_done(task.slide_id)
            if finished:
                _check_mpp(store, task)
                _check_source(store, task)
        except StoreError as error:
            return error
        return finished

    for task, finished in zip(tasks, backend_of(store.path).map(look, tasks), strict=True):
        if isinstance(finished, StoreError):
            failed.append(SlideResult(task.slide_id, error=finished))
        else:
            (done if finished else todo).append(task)
    return done, todo, failed


def _check_mpp(store: FeatureStore, task: SlideTask) -> None:
    """Refuse to call a slide done that was extracted at another resolution than now stated."""
    mpp = store.record(task.slide_id).attrs.get("mpp", {})
    asked = task.mpp or (task.fallback_mpp if mpp.get("source") == "user" else None)
    if asked is not None and abs(mpp.get("level0", asked) / asked - 1) > 1e-6:
        raise StoreError(
            f"slide {task.slide_id!r} was extracted with {mpp['level0']:.6g} µm/px, "
            f"you state {asked:.6g}",
            f"run `{_drop(store, task)}`, then extract it again",
        )


def _check_source(store: FeatureStore, task: SlideTask) -> None:
    """Refuse to call a slide done whose file has other bytes than when it was extracted.

    A store of an older version knows their number alone. A file that cannot be read is not judged.
    """
    stored = store.record(task.slide_id).attrs.get("source")
    try:
        now = source(task.path)
    except OSError:
        return
    if isinstance(stored, dict) and any(
        key in stored and stored[key] != now[key] for key in ("bytes", "digest")
    ):
        raise StoreError(
            f"slide {task.slide_id!r} was extracted from {stored.get('file')} of "
            f"{stored.get('bytes')} bytes; {task.path} is another file, of {now['bytes']} bytes",
            f"run `{_drop(store, task)}`, then extract it again; or give the new file another name",
        )


def _drop(store: FeatureStore, task: SlideTask) -> str:
    return shlex.join(["hmil-fast", "store", "drop", str(store.path), task.slide_id])
