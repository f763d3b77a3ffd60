"""Consoles for notes and progress on stderr."""

from collections.abc import Callable, Iterable, Sequence
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, track


def stderr(*, quiet: bool = False) -> Console:
    """A console on stderr that breaks no lines; of several processes only one is not quiet."""
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)


def notes(console: Console) -> Callable[[str], None]:
    """A function that prints one note a call."""

    def note(text: str) -> None:
        console.print(f"[yellow]note:[/] {escape(text)}")

    return note


def track_slides(slide_ids: Sequence[str], count: int) -> Iterable[str]:
    """Show the progress of a loop over slides, of which `count` are worked on."""
    err = Console(stderr=True)
    quiet = not err.is_terminal  # it would leave an empty line
    return track(slide_ids, "slides", count, console=err, transient=True, disable=quiet)


class Bar:
    """A progress bar that is drawn only on a terminal; elsewhere it would leave an empty line.

    Args:
        console: Where to draw.
        columns: Columns of the bar.
    """

    def __init__(self, console: Console, *columns: ProgressColumn) -> None:
        self.console, self.note = console, notes(console)
        self._bar = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()
