"""Add a command to the parser, and convert texts of options to numbers, paths and stores."""

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hmil_fast.errors import UsageError

if TYPE_CHECKING:  # it imports numpy, which --help does without
    from hmil_fast.io.store.location import Location

Command = Callable[[argparse.Namespace], int]
N = TypeVar("N", int, float)

Commands = argparse._SubParsersAction  # argparse gives it no public name


def add_command(
    commands: "Commands[argparse.ArgumentParser]", name: str, text: str, run: Command
) -> argparse.ArgumentParser:
    """Add a command that calls `run` with its parsed arguments."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_old_name(parser: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    """Add the name that an option had in version 0.1.0: hidden, and noted on stderr when used."""
    new = f"--{settings['dest'].replace('_', '-')}"

    class OldName(argparse.Action):
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: str | None = None,
        ) -> None:
            sys.stderr.write(f"note: {name} is now called {new}\n")
            setattr(namespace, self.dest, self.const if self.nargs == 0 else values)

    if settings.pop("action", None) == "store_true":
        settings |= {"nargs": 0, "const": True}
    parser.add_argument(
        name, action=OldName, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **settings
    )


def positive(text: str) -> float:
    """A number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def share(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def fraction(text: str) -> float:
    """A number between 0 and 1, neither of them."""
    return _number(text, float, lambda value: 0 < value < 1, "a number between 0 and 1")


def count(text: str) -> int:
    """A whole number from 1 up."""
    return _number(text, int, lambda value: value >= 1, "a whole number from 1 up")


def count_or_none(text: str) -> int:
    """A whole number from 0 up."""
    return _number(text, int, lambda value: value >= 0, "a whole number from 0 up")


def batch(text: str) -> int | None:
    """A whole number from 1 up, or "auto", which is None."""
    return None if text == "auto" else count(text)


def shard(text: str) -> tuple[int, int]:
    """I/N: the I-th of N parts, from 1 up."""
    with suppress(ValueError):
        index, parts = map(int, text.split("/"))
        if 1 <= index <= parts:
            return index, parts
    raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 1/4 to 4/4")


def colour(text: str) -> tuple[int, int, int]:
    """R,G,B: three grey levels from 0 to 255."""
    with suppress(ValueError):
        red, green, blue = map(int, text.split(","))
        if all(0 <= level <= 255 for level in (red, green, blue)):
            return red, green, blue
    raise argparse.ArgumentTypeError(f"{text!r} is not R,G,B, such as 200,200,180")


def store(text: str) -> "Location":
    """A feature store: a folder, or a URL such as s3://bucket/prefix."""
    if ":/" not in text:
        return Path(text)
    from hmil_fast.io.store.location import location

    try:
        return location(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error.what}: {error.fix}") from None


def path(text: str) -> Path:
    """A file or folder on a disk of this machine; only stores may be URLs."""
    if ":/" in text:
        from hmil_fast.io.store.location import is_url

        if is_url(text):
            raise argparse.ArgumentTypeError(
                f"{text!r} is a URL, which only a STORE may be: give a path on a disk, and copy "
                "the files"
            )
    return Path(text)


def tile_px(text: str) -> int:
    """A whole number from 16 to 8192."""
    return _number(text, int, lambda value: 16 <= value <= 8192, "a whole number from 16 to 8192")


def _number(text: str, kind: Callable[[str], N], fits: Callable[[N], bool], wanted: str) -> N:
    with suppress(ValueError):
        value = kind(text)
        if fits(value):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
