"""Consoles for notes and progress on stderr."""

from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import track


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
