"""Settings as dataclass fields that also state their allowed values, meaning and presets.

From these fields come the checks, the reading of key=value, `hmil-fast settings` and
docs/settings.md, so that each setting is described once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any

from hmil_fast.errors import UsageError

PRESET_NAMES = ("best", "paper", "released")


@dataclass(frozen=True)
class Allowed:
    """Values that a setting may have.

    Attributes:
        text: The values, in few words.
        accepts: Tells whether a value of the right type is among them.
        fix: What to do about another value.
    """

    text: str
    accepts: Callable[[Any], bool]
    fix: str


def one_of(*words: str) -> Allowed:
    """Allow these words."""
    listed = ", ".join(words)
    return Allowed(listed, lambda value: value in words, f"choose one of {listed}")


def whole(low: int, high: int | None = None) -> Allowed:
    """Allow whole numbers from `low` to `high`, both included."""
    text = f"at least {low}" if high is None else f"{low} to {high}"
    return Allowed(
        text, lambda value: low <= value <= (inf if high is None else high), f"give {text}"
    )


POSITIVE = Allowed("above 0", lambda value: 0 < value < inf, "give a positive number")
NOT_NEGATIVE = Allowed("0 or more", lambda value: 0 <= value < inf, "give 0 or more")
SHARE = Allowed(
    "0 or more, less than 1", lambda value: 0 <= value < 1, "give 0 or more, less than 1"
)


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: Its name, as in key=value.
        allowed: Its values.
        text: What it sets.
        defaults: Its default in each of `PRESET_NAMES`.
    """

    name: str
    allowed: Allowed
    text: str
    defaults: tuple[Any, Any, Any]


def setting(default: Any, allowed: Allowed, text: str, *others: Any) -> Any:
    """Declare a setting as a field of a dataclass.

    Args:
        default: Its default, in the preset `best`.
        allowed: Its values.
        text: What it sets.
        others: Its defaults in the presets `paper` and `released`, where they differ.
    """
    paper, released = others or (default, default)
    return field(
        default=default,
        metadata={"allowed": allowed, "text": text, "defaults": (default, paper, released)},
    )


def settings_of(kind: Any) -> Iterator[Setting]:
    """Yield the settings of a dataclass, or of an instance of it, in the order of its fields."""
    for each in fields(kind):
        if each.metadata:
            yield Setting(each.name, **each.metadata)


def check_settings(values: Any) -> None:
    """Check all settings of a dataclass.

    Raises:
        UsageError: A value that is not allowed; names the setting.
    """
    for each in settings_of(values):
        value = getattr(values, each.name)
        if not each.allowed.accepts(value):
            raise UsageError(f"setting {each.name} is {value!r}", each.allowed.fix)
