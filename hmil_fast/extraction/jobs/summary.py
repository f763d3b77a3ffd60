"""What a job tells the person who started it: progress, a line for each slide, the summary."""

import shlex
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from hmil_fast.errors import SlideError, StoreError
from hmil_fast.extraction.jobs.events import save_job
from hmil_fast.extraction.jobs.progress import JobProgress
from hmil_fast.extraction.jobs.status import noted, undecoded
from hmil_fast.extraction.jobs.worklist import Elsewhere, Message, SearchDone, TilesDone
from hmil_fast.extraction.pipeline.attributes import source
from hmil_fast.extraction.pipeline.result import SlideResult
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.store import FeatureStore
from hmil_fast.io.store.backend import backend_of


class Report:
    """Gathers what the processes of a job say; `todo` are the slides they are to do.

    Args:
        err: Where progress is shown.
        store: The store.
        tasks: All slides of the job.
    """

    def __init__(self, err: Console, store: FeatureStore, tasks: Sequence[SlideTask]) -> None:
        self.store = store
        save_job(store.path, [task.slide_id for task in tasks])
        self.done, self.todo, damaged = _split_done(store, tasks)
        self.results = {result.slide_id: result for result in damaged}
        self.elsewhere: set[str] = set()
        self.timings: defaultdict[str, float] = defaultdict(float)
        self._ended = 0
        self._err = err
        self._start = time.perf_counter()
        self._progress = JobProgress(err, self.todo)

    def __enter__(self) -> "Report":
        self._progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.__exit__()

    def __call__(self, message: Message) -> None:
        """Take a message of a process."""
        if isinstance(message, TilesDone):
            self._progress.tiles(message)
        elif isinstance(message, SearchDone):
            self._progress.search(message)
        elif isinstance(message, Elsewhere):
            self.elsewhere.add(message.slide_id)
            self._progress.elsewhere(message.slide_id)
        elif isinstance(message, SlideResult):
            # each worker comes to know that a slide failed in another
            if message.slide_id not in self.results:
                self.results[message.slide_id] = message
                self._progress.slide(message)
        elif message:
            self._ended += 1
            for stage, seconds in message.items():
                self.timings[stage] += seconds

    def note(self, text: str) -> None:
        """Show a line beside the progress."""
        self._err.print(text, highlight=False, soft_wrap=True)

    def print(self, processes: int) -> int:
        """Print the summary and, where tiles were made, where the time went.

        Args:
            processes: That did the job; on a cluster more may have come.

        Returns:
            The exit code: 0 when all slides are in the store.
        """
        seconds = time.perf_counter() - self._start
        for task in self.todo:
            if task.slide_id in self.results or task.slide_id in self.elsewhere:
                continue
            if self._is_stored(task.slide_id):  # the word of it was lost with who said it
                self.elsewhere.add(task.slide_id)
            else:
                error = SlideError(
                    f"slide {task.path}: no process was left to do it",
                    "see above why they ended, then run the same command again",
                )
                self.results[task.slide_id] = SlideResult(task.slide_id, error=error)
        _print_summary(self, seconds)
        # those of a process that died are not known
        if self.timings and any(result.num_tiles for result in self.results.values()):
            _print_timings(self._err, self.timings, seconds * max(processes, self._ended))
        return 1 if any(result.error for result in self.results.values()) else 0

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


def _print_summary(report: Report, seconds: float) -> None:
    out = Console(soft_wrap=True, highlight=False)
    failed = [result for result in report.results.values() if result.error is not None]
    made = len(report.results) - len(failed)
    others = len(report.elsewhere - report.results.keys())
    tiles = sum(result.num_tiles for result in report.results.values())
    rate = f" ({tiles:,} tiles in {seconds:.1f} s, {tiles / seconds:,.1f} tiles/s)" if tiles else ""
    # of another job, or of a process of ours that died before it could say so
    more = f"{others} more {'is' if others == 1 else 'are'} in the store, " if others else ""
    out.print(
        f"{made} slides extracted{rate}, {more}{len(report.done)} were done before, "
        f"{len(failed)} failed. Store: {report.store.path}",
        markup=False,
    )
    bad = {result.slide_id: result.bad_tiles for result in report.results.values()}
    if text := undecoded(bad):
        out.print(f"  {text}", markup=False)
    for text in noted({result.slide_id: result.notes for result in report.results.values()}):
        out.print(f"  {text}", markup=False)
    for result in failed:
        assert result.error is not None
        out.print(
            f"  {result.slide_id}: {result.error.what}\n    Fix: {result.error.fix}", markup=False
        )


def _print_timings(err: Console, seconds: Mapping[str, float], total: float) -> None:
    table = Table("stage", "seconds", "share", title="where the time went", title_justify="left")
    # one after the other; what is "(threads)" or "(GPU)" went on beside them
    in_turn = sum(spent for stage, spent in seconds.items() if "(" not in stage)
    rows = dict(seconds) | {"other (starting, waiting)": max(0.0, total - in_turn)}
    for stage, spent in sorted(rows.items(), key=lambda item: -item[1]):
        table.add_row(stage, f"{spent:.2f}", f"{spent / total:.0%}")
    err.print(table)
    if "encode (GPU)" in seconds:
        busy = seconds["encode (GPU)"] / total
        err.print(f"the GPU was busy {busy:.0%} of the time, start-up included", highlight=False)
