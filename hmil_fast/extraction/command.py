"""`hmil-fast extract`: the job as a person sees it, with progress, summary and timings."""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from hmil_fast.device import pick_device
from hmil_fast.errors import StoreError, UsageError
from hmil_fast.extraction.doctor import print_slides, tile_spec
from hmil_fast.extraction.encoders import load_encoder
from hmil_fast.extraction.plan import SlideTask, collect_slides
from hmil_fast.extraction.run import Extractor, SlideResult, log_result, store_spec
from hmil_fast.io.store import FeatureStore, create_store


def extract(args: argparse.Namespace) -> int:
    """Extract slides into a store; returns the exit code.

    Raises:
        UsageError: Nothing to extract, or a wrong encoder, device or manifest.
        StoreError: The store was made with another encoder or other tiles.
    """
    tasks = collect_slides(args.slides, args.manifest, args.slide_mpp)
    spec = tile_spec(args)
    encoder = load_encoder(args.encoder, args.weights, pick_device(args.device))
    if args.dry_run:
        return print_slides(tasks, spec, encoder, args.store)
    if not any(task.path.exists() for task in tasks):  # before a store is made with these tiles
        raise UsageError(f"{tasks[0].path} does not exist", "check the path")
    store = create_store(args.store, store_spec(encoder, spec, args.dtype))
    return run_job(tasks, Extractor(store, encoder, spec, batch=args.batch, threads=args.threads))


def run_job(tasks: list[SlideTask], extractor: Extractor) -> int:
    """Extract what is not done yet, with progress and summary; returns the exit code."""
    err = Console(stderr=True)
    card, mpp = extractor.encoder.card, extractor.spec.mpp
    if card.mpp and not any(abs(mpp / stated - 1) < 0.1 for stated in card.mpp):
        stated = ", ".join(map(str, card.mpp))
        err.print(f"[yellow]{card.name} was made for {stated} µm/px, you ask for {mpp}")
    store = extractor.store
    done, todo, failed = _split_done(store, tasks)
    start, tiles = time.perf_counter(), 0
    with _Progress(err, todo) as progress:
        for result in extractor.run(todo, progress.tiles):
            progress.slide(result)
            log_result(store, result)
            tiles += result.num_tiles
            if result.error is not None:
                failed.append(result)
    seconds = time.perf_counter() - start
    _print_summary(store.path, len(done), len(tasks), tiles, failed, seconds)
    if tiles:
        _print_timings(err, extractor.timings.seconds, seconds)
    return 1 if failed else 0


def _split_done(
    store: FeatureStore, tasks: list[SlideTask]
) -> tuple[list[SlideTask], list[SlideTask], list[SlideResult]]:
    done: list[SlideTask] = []
    todo: list[SlideTask] = []
    failed: list[SlideResult] = []
    for task in tasks:
        try:
            finished = store.is_done(task.slide_id)
            if finished:
                _check_mpp(store, task)
            (done if finished else todo).append(task)
        except StoreError as error:
            failed.append(SlideResult(task.slide_id, error=error))
    return done, todo, failed


def _check_mpp(store: FeatureStore, task: SlideTask) -> None:
    """Refuse to call a slide done that was extracted at another resolution than now stated."""
    mpp = store.record(task.slide_id).attrs.get("mpp", {})
    asked = task.mpp or (task.fallback_mpp if mpp.get("source") == "user" else None)
    if asked is not None and abs(mpp.get("level0", asked) / asked - 1) > 1e-6:
        raise StoreError(
            f"slide {task.slide_id!r} was extracted with {mpp['level0']:.6g} µm/px, "
            f"you state {asked:.6g}",
            f"run `hmil-fast store drop {store.path} {task.slide_id}`, then extract it again",
        )


class _Progress:
    """A bar over the bytes of all slides, so that the time left is known before tiles are."""

    def __init__(self, console: Console, tasks: list[SlideTask]) -> None:
        self.console = console
        self._sizes = {task.slide_id: _size(task.path) for task in tasks}
        self._before = 0.0
        self._tiles = 0
        self._tiles_before = 0
        self._start = time.perf_counter()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._count, self._done = len(tasks), 0
        total = max(sum(self._sizes.values()), 1)
        self._task = self._bar.add_task(f"0/{self._count} slides", total=total, rate="")

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tiles(self, task: SlideTask, done: int, total: int) -> None:
        """Some tiles of a slide are encoded."""
        self._tiles = self._tiles_before + done
        rate = self._tiles / (time.perf_counter() - self._start)
        completed = self._before + self._sizes[task.slide_id] * done / total
        self._bar.update(self._task, completed=completed, rate=f"{rate:,.1f} tiles/s")

    def slide(self, result: SlideResult) -> None:
        """A slide has ended, well or not."""
        self._before += self._sizes[result.slide_id]
        self._tiles_before += result.num_tiles
        self._done += 1
        self._bar.update(
            self._task,
            completed=self._before,
            description=f"{self._done}/{self._count} slides",
        )
        name = escape(result.slide_id)
        if result.error is not None:
            text = (
                f"[red]✗[/] {name}: {escape(result.error.what)}. "
                f"[dim]Fix: {escape(result.error.fix)}"
            )
        else:
            bad = f", {result.bad_tiles} cannot be decoded" if result.bad_tiles else ""
            note = f" ([yellow]{result.note}[/])" if result.note else ""
            text = (
                f"[green]✓[/] {name}: {result.num_tiles:,} tiles{bad} "
                f"in {result.seconds:.1f} s{note}"
            )
        self.console.print(text, highlight=False, soft_wrap=True)


def _print_summary(
    path: Path, done: int, count: int, tiles: int, failed: list[SlideResult], seconds: float
) -> None:
    out = Console(soft_wrap=True, highlight=False)
    rate = f" ({tiles:,} tiles in {seconds:.1f} s, {tiles / seconds:,.1f} tiles/s)" if tiles else ""
    out.print(
        f"{count - done - len(failed)} slides extracted{rate}, {done} were done before, "
        f"{len(failed)} failed. Store: {path}",
        markup=False,
    )
    for result in failed:
        assert result.error is not None
        out.print(
            f"  {result.slide_id}: {result.error.what}\n    Fix: {result.error.fix}", markup=False
        )


def _print_timings(err: Console, seconds: Mapping[str, float], total: float) -> None:
    table = Table("stage", "seconds", "share", title="where the time went", title_justify="left")
    for stage, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        table.add_row(stage, f"{spent:.2f}", f"{spent / total:.0%}")
    err.print(table)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
