"""The progress of a job in the terminal: a bar, and a line for each slide."""

import time
from collections.abc import Sequence

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

from hmil_fast.extraction.jobs.worklist import SearchDone, TilesDone, size
from hmil_fast.extraction.pipeline.result import SlideResult
from hmil_fast.extraction.slides import SlideTask


def searching(share: float, px: int) -> str:
    """How far the search for a slide's tissue is, in words."""
    return (
        f"looking for tissue, {share:.0%} of {px / 1e9:,.1f} gigapixels "
        "(a slide with smaller levels has fewer to read)"
    )


class JobProgress:
    """A bar over the bytes of all slides, so that the time left is known before tiles are."""

    def __init__(self, console: Console, tasks: Sequence[SlideTask]) -> None:
        self.console = console
        self._sizes = {task.slide_id: size(task.path) for task in tasks}
        self._ended: dict[str, int] = {}
        self._tiles = 0
        self._working: dict[str, tuple[int, float]] = {}
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
        self._count = len(tasks)
        total = max(sum(self._sizes.values()), 1)
        self._task = self._bar.add_task(f"0/{self._count} slides", total=total, rate="")

    def __enter__(self) -> "JobProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tiles(self, now: TilesDone) -> None:
        """Some tiles of a slide are encoded."""
        self._working[now.slide_id] = (now.done, self._sizes[now.slide_id] * now.done / now.total)
        self._show()

    def search(self, now: SearchDone) -> None:
        """The tissue of a large slide without small levels is looked for."""
        text = f"{escape(now.slide_id)}: {searching(now.share, now.px)}"
        self.console.print(text, style="dim", highlight=False, soft_wrap=True)

    def elsewhere(self, slide_id: str) -> None:
        """Another job has finished a slide."""
        self._end(slide_id, 0)

    def slide(self, result: SlideResult) -> None:
        """A slide has ended, well or not."""
        self._end(result.slide_id, result.num_tiles)
        name = escape(result.slide_id)
        if result.error is not None:
            text = (
                f"[red]✗[/] {name}: {escape(result.error.what)}. "
                f"[dim]Fix: {escape(result.error.fix)}"
            )
        else:
            bad = f", {result.bad_tiles} cannot be decoded" if result.bad_tiles else ""
            said = "; ".join(escape(what) for what, _ in result.notes)
            note = f" ([yellow]{said}[/])" if said else ""
            fixes = dict.fromkeys(escape(fix) for _, fix in result.notes if fix)
            mark = "[yellow]![/]" if fixes or not result.num_tiles else "[green]✓[/]"
            text = (
                f"{mark} {name}: {result.num_tiles:,} tiles{bad} in {result.seconds:.1f} s{note}"
                + "".join(f". [dim]Fix: {fix}[/]" for fix in fixes)
            )
        self.console.print(text, highlight=False, soft_wrap=True)

    def _end(self, slide_id: str, tiles: int) -> None:
        self._working.pop(slide_id, None)
        self._tiles += tiles
        self._ended[slide_id] = self._sizes[slide_id]
        self._show()

    def _show(self) -> None:
        tiles = self._tiles + sum(tiles for tiles, _ in self._working.values())
        self._bar.update(
            self._task,
            completed=sum(self._ended.values()) + sum(share for _, share in self._working.values()),
            description=f"{len(self._ended)}/{self._count} slides",
            rate=f"{tiles / (time.perf_counter() - self._start):,.1f} tiles/s" if tiles else "",
        )
