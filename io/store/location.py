"""Parse where a store lies: a folder, or a prefix in an object store."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias

from hmil_fast.errors import UsageError

_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "https")
_URL = re.compile(r"[A-Za-z][\w+.-]+:/|[^/]*://")  # C:/ is a drive


@dataclass(frozen=True, order=True)
class ObjectUrl:
    """An object, or all objects below a prefix.

    Args:
        root: URL of the store, such as s3://bucket/cohort.
        key: Key below it; "" is the store itself.
    """

    root: str
    key: str = ""

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.root, f"{self.key}/{name}" if self.key else name)

    def __str__(self) -> str:
        return f"{self.root}/{self.key}" if self.key else self.root

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Self:
        """All before the last slash of the key."""
        return type(self)(self.root, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> Self:
        """The same with another name."""
        return self.parent / name


Location: TypeAlias = Path | ObjectUrl


def is_url(place: str) -> bool:
    """Whether it begins as URLs do, also where one of the slashes is missing."""
    return _URL.match(place) is not None


def location(place: str | Location) -> Location:
    """A folder, or a URL of an object store such as s3://bucket/prefix, gs://… or az://….

    Raises:
        UsageError: a URL of another kind, or one with a single slash.
    """
    if not isinstance(place, str):
        return place
    if not is_url(place):
        return Path(place)
    scheme, sign, rest = place.partition("://")
    if not sign or scheme not in _SCHEMES or not rest.strip("/"):
        raise UsageError(
            f"{place!r} is not a store",
            "give a folder, or a URL such as s3://bucket/prefix, gs://bucket/prefix or "
            "az://container/prefix",
        )
    return ObjectUrl(place.rstrip("/"))
