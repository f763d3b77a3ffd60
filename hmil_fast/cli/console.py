"""Where people are told what happens: notes and progress on stderr, results on stdout."""

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape


def stderr(*, quiet: bool = False) -> Console:
    """A console on stderr that breaks no lines; of several processes only one is not quiet."""
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)


def notes(console: Console) -> Callable[[str], None]:
    """A function that prints one note a call."""

    def note(text: str) -> None:
        console.print(f"[yellow]note:[/] {escape(text)}")

    return note
