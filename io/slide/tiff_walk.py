"""Walk a TIFF's directories before a library parses them: what is cut off, endless or too big."""

import struct
from pathlib import Path
from typing import BinaryIO

from hmil_fast.errors import SlideError

MAX_DIRECTORIES = 1024
_SUB_IFDS = 330
_OFFSETS = {4: "I", 13: "I", 16: "Q", 18: "Q"}  # types that an offset may have
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
               16: 8, 17: 8, 18: 8}  # fmt: skip


class Malformed(Exception):
    """What of a file contradicts itself, in words."""


def is_tiff(path: Path) -> bool:
    """Whether a file starts as a TIFF or BigTIFF does."""
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def check_directories(path: Path) -> None:
    """Follow the chain of directories and add up the bytes of their tags.

    A parser makes objects of all tags, so a small file whose tags share bytes could take any
    memory.

    Raises:
        SlideError: The chain leaves the file or returns to itself, there are more than
            `MAX_DIRECTORIES`, or the tags claim more than twice the bytes of the file.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        try:
            _check(_Format(file, ndpi=path.suffix == ".ndpi"), file, length)
        except Malformed as error:
            raise damaged(path, str(error)) from None
        except struct.error:
            raise damaged(path, "it ends within a directory") from None


def damaged(path: Path, why: str) -> SlideError:
    """The error for a file whose structure cannot be followed."""
    return SlideError(f"{path.name} is damaged or cut off: {why}", "copy the file again")


class _Format:
    """Sizes of numbers in a file's directories: TIFF, BigTIFF, or NDPI's TIFF of 64 bits."""

    def __init__(self, file: BinaryIO, *, ndpi: bool) -> None:
        magic = file.read(4)
        self.order = order = "<" if magic[:2] == b"II" else ">"
        big = 43 in (magic[2], magic[3])
        self.count = order + ("Q" if big else "H")
        self.tag = struct.Struct(order + ("HHQQ" if big else "HHII"))
        self.next = order + ("Q" if big or ndpi else "I")
        self.inline = 8 if big else 4
        file.seek(8 if big else 4)
        self.first = _number(file, self.next)


def _check(form: _Format, file: BinaryIO, length: int) -> None:
    seen: set[int] = set()
    todo = [(form.first, True)]
    claimed = 0
    while todo:
        at, chained = todo.pop()
        if at >= length:
            raise Malformed(f"only {len(seen)} of its directories are there")
        if at in seen:
            if chained:
                raise Malformed("its directories lead back to each other")
            continue
        seen.add(at)
        if len(seen) > MAX_DIRECTORIES:
            raise Malformed(f"more than {MAX_DIRECTORIES:,} directories")
        file.seek(at)
        count = _number(file, form.count)
        if count > 4096:
            raise Malformed(f"a directory of {count:,} tags")
        start = file.tell()
        entries = _read(file, count * form.tag.size)
        following = _number(file, form.next) if chained else 0
        for n, (code, kind, values, where) in enumerate(form.tag.iter_unpack(entries)):
            size = _TYPE_BYTES.get(kind, 1) * values
            claimed += size if size > form.inline else 0
            if code == _SUB_IFDS and kind in _OFFSETS and values <= MAX_DIRECTORIES:
                inline = start + (n + 1) * form.tag.size - form.inline
                place = where if size > form.inline else inline
                todo += [(sub, False) for sub in _sub_ifds(form, file, kind, values, place)]
        if claimed > 2 * length:
            raise Malformed(f"its tags claim {claimed:,} bytes of {length:,}")
        if following:
            todo.append((following, True))


def _sub_ifds(form: _Format, file: BinaryIO, kind: int, values: int, place: int) -> list[int]:
    """Offsets of the directories that a SubIFDs tag names, which lies at `place`."""
    size = _TYPE_BYTES[kind]
    file.seek(min(place, 2**62))
    return list(struct.unpack(f"{form.order}{values}{_OFFSETS[kind]}", _read(file, size * values)))


def _read(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise Malformed("it ends within a directory")
    return data


def _number(file: BinaryIO, form: str) -> int:
    return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])
