"""The progress bar of `hmil-fast extract`: bytes of all slides, a line for each slide."""

import os
import sys
import time

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hmil_fast.cli.console import Bar
from hmil_fast.extraction.jobs.messages import (
    Elsewhere,
    Event,
    Hanging,
    JobStarted,
    Notice,
    SearchDone,
    TilesDone,
)
from hmil_fast.extraction.pipeline.result import SlideResult

_STYLES = {"info": "none", "note": "yellow", "bad": "red"}


def searching(share: float, px: int) -> str:
    """Describe how far the search for a slide's tissue is."""
    return (
        f"looking for tissue, {share:.0%} of {px / 1e9:,.1f} gigapixels "
        "(a slide with smaller levels has fewer to read)"
    )


class JobBar(Bar):
    """A bar over the bytes of all slides, so that the time left is known before tiles are.

    Args:
        console: Where to draw.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(
            console,
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._sizes: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self._tiles = 0
        self._working: dict[str, tuple[int, float]] = {}
        self._start = time.perf_counter()
        self._task = self._bar.add_task("", visible=False, rate="")

    def update(self, event: Event) -> None:
        """Show an event of the job."""
        if isinstance(event, JobStarted):
            self._sizes = {task.slide_id: task.file_bytes for task in event.tasks}
            total = max(sum(self._sizes.values()), 1)
            text = f"0/{len(self._sizes)} slides"
            self._bar.update(self._task, total=total, description=text, visible=True)
        elif isinstance(event, Notice):
            style = _STYLES[event.level]
            self._print(escape(event.text), style)
        elif isinstance(event, Hanging):
            _end_hanging(event.minutes)
        elif isinstance(event, TilesDone):
            share = self._sizes[event.slide_id] * event.done / event.total
            self._working[event.slide_id] = (event.done, share)
            self._show()
        elif isinstance(event, SearchDone):
            self._print(f"{escape(event.slide_id)}: {searching(event.share, event.px)}", "dim")
        elif isinstance(event, Elsewhere):
            self._end(event.slide_id, 0)
        else:
            self._slide(event)

    def _print(self, text: str, style: str = "none") -> None:
        self.console.print(text, style=style, highlight=False, soft_wrap=True)

    def _slide(self, result: SlideResult) -> None:
        self._end(result.slide_id, result.num_tiles)
        name = escape(result.slide_id)
        if result.error is not None:
            text = (
                f"[red]✗[/] {name}: {escape(result.error.what)}. "
                f"[dim]Fix: {escape(result.error.fix)}"
            )
        else:
            bad = f", {result.bad_tiles} cannot be decoded" if result.bad_tiles else ""
            notes = "; ".join(escape(what) for what, _ in result.notes)
            note = f" ([yellow]{notes}[/])" if notes else ""
            fixes = dict.fromkeys(escape(fix) for _, fix in result.notes if fix)
            mark = "[yellow]![/]" if fixes or not result.num_tiles else "[green]✓[/]"
            text = (
                f"{mark} {name}: {result.num_tiles:,} tiles{bad} in {result.seconds:.1f} s{note}"
                + "".join(f". [dim]Fix: {fix}[/]" for fix in fixes)
            )
        self._print(text)

    def _end(self, slide_id: str, tiles: int) -> None:
        self._working.pop(slide_id, None)
        self._tiles += tiles
        self._ended[slide_id] = self._sizes.get(slide_id, 0)
        self._show()

    def _show(self) -> None:
        tiles = self._tiles + sum(tiles for tiles, _ in self._working.values())
        self._bar.update(
            self._task,
            completed=sum(self._ended.values()) + sum(share for _, share in self._working.values()),
            description=f"{len(self._ended)}/{len(self._sizes)} slides",
            rate=f"{tiles / (time.perf_counter() - self._start):,.1f} tiles/s" if tiles else "",
        )


def _end_hanging(minutes: float) -> None:
    """End this process, whose threads hang, and say what to do."""
    sys.stderr.write(
        f"\nhmil-fast: no tile was done for {minutes:g} minutes: a slide, or its disk, hangs\n"
        "Fix: run the same command with --workers 1: a worker that hangs is replaced, and the "
        "slide comes last\n"
    )
    sys.stderr.flush()
    os._exit(1)
