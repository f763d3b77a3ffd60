"""Write a file whole or not at all: beside its place, flushed to the disk, then renamed."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIX = ".partial"  # of every temporary file


def write_file(path: Path, write: Callable[[Path], object], *, lasting: bool = True) -> None:
    """Write a file over an older one; readers see the old content or the new one.

    After an error the old file is still there, and nothing beside it.

    Args:
        path: The file; its folder exists.
        write: Creates the file at the path that it is given, by open(), whose permissions it keeps.
        lasting: Whether the file must survive a power cut (fsync).

    Raises:
        OSError: It cannot be written.

    Example:
        ``write_file(path, lambda partial: picture.save(partial, "PNG"))``
    """
    with _partial(path, write, lasting) as partial:
        partial.replace(path)


def create_file(path: Path, write: Callable[[Path], object], *, lasting: bool = True) -> bool:
    """Write a file only if there is none; False, and the old one stays, if there is.

    Of several processes one creates it: a hard link makes the whole file appear, or fails. For the
    arguments and errors see `write_file`.
    """
    with _partial(path, write, lasting) as partial:
        try:
            os.link(partial, path)
        except FileExistsError:
            # over NFS a link may succeed and its reply be lost: then the file has two names
            return partial.stat().st_nlink == 2
    return True


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8 as `write_file` does."""
    write_file(path, lambda partial: partial.write_bytes(text.encode()))


def sweep_partials(folder: Path) -> None:
    """Delete the unfinished files that killed processes left in a folder."""
    for partial in folder.glob(f"*{SUFFIX}"):
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _partial(path: Path, write: Callable[[Path], object], lasting: bool) -> Iterator[Path]:
    """Write a temporary file, yield it to be moved, and delete what is left of it."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{SUFFIX}")
    try:
        write(partial)
        if lasting:
            sync(partial)
        yield partial
    finally:
        partial.unlink(missing_ok=True)
    if lasting:
        sync(path.parent)
