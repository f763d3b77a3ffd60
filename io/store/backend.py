"""The one seam between the store and where it lies: `disk` for folders, `objects` for URLs.

A store in an object store is written in a local folder first, checked there, and uploaded whole.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy.typing as npt

from hmil_fast.errors import StoreError
from hmil_fast.io.store import local, object_errors, objects
from hmil_fast.io.store.local import OpenFile, Run, Stamp
from hmil_fast.io.store.location import Location, ObjectUrl
from hmil_fast.io.store.objects import OpenObject

__all__ = ["OpenFile", "OpenObject", "Run", "Stamp"]

_ROUND_TRIPS = 16
A = TypeVar("A")
B = TypeVar("B")


def failed(error: OSError, doing: str, path: Location) -> StoreError:
    """A StoreError that names the place, the reason and what to do."""
    if not isinstance(path, ObjectUrl):
        return local.failed(error, doing, path)
    if "://" in str(error.filename):
        return object_errors.failed(error, doing, path)
    return local.failed(error, doing, Path(tempfile.gettempdir()))


def check(store: Location, *, writing: bool) -> None:
    """See within seconds whether a store can be reached and written to safely.

    Raises:
        StoreError: it cannot.
    """
    if isinstance(store, ObjectUrl):
        objects.check(store, writing=writing)


def each(store: Location, task: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """map(task, items); side by side where every task waits for a server."""
    if not isinstance(store, ObjectUrl):
        yield from map(task, items)
        return
    with ThreadPoolExecutor(_ROUND_TRIPS) as pool:
        yield from pool.map(task, items)


def exists(path: Location) -> bool:
    """Whether something of that name exists."""
    return objects.exists(path) if isinstance(path, ObjectUrl) else local.exists(path)


def names(folder: Location) -> list[str]:
    """Sorted names in a folder; empty when there is none."""
    return objects.names(folder) if isinstance(folder, ObjectUrl) else local.names(folder)


def stamps(folder: Location) -> dict[str, Stamp]:
    """Name → stamp of every file in a folder; empty when there is none."""
    return objects.stamps(folder) if isinstance(folder, ObjectUrl) else local.stamps(folder)


def holders(folder: Location, name: str) -> list[str]:
    """Sorted names of the folders in a folder that hold a file of that name."""
    if isinstance(folder, ObjectUrl):
        return objects.holders(folder, name)
    return local.holders(folder, name)


def make_folder(path: Location) -> None:
    """Make a folder and its parents; object stores have none."""
    if not isinstance(path, ObjectUrl):
        local.make_folder(path)


def newest_change(folder: Location) -> float:
    """Latest change in a tree, seconds since the epoch.

    Raises:
        FileNotFoundError: there is none.
    """
    if isinstance(folder, ObjectUrl):
        return objects.newest_change(folder)
    return local.newest_change(folder)


def tree(folder: Location) -> dict[str, int]:
    """Key ("features/c/0/0") → size in bytes of every file in a tree."""
    return objects.objects(folder) if isinstance(folder, ObjectUrl) else local.objects(folder)


def sizes(folder: Location, keys: Sequence[str]) -> dict[str, int]:
    """Sizes in bytes of files in a tree, none of them a link or reached by one.

    Raises:
        OSError: one is not there, is no file, or lies elsewhere.
    """
    if not isinstance(folder, ObjectUrl):
        return local.sizes(folder, keys)
    return objects.sizes(folder, keys)


def create_exclusive(path: Location, data: bytes, *, lasting: bool = True) -> bool:
    """Create a file whole or not at all; False when it is there already."""
    if isinstance(path, ObjectUrl):
        return objects.create_exclusive(path, data)
    return local.create_exclusive(path, data, lasting=lasting)


def replace(path: Location, data: bytes) -> None:
    """Write a file over what was there; readers see the old one or the new one."""
    if isinstance(path, ObjectUrl):
        objects.replace(path, data)
    else:
        local.replace(path, data)


def renew(path: Location, stamp: Stamp, data: bytes) -> None:
    """Give a file a new stamp; an object by writing `data` over the version read, if it is left."""
    if isinstance(path, ObjectUrl):
        objects.renew(path, stamp, data)
    else:
        local.touch(path)


def remove(path: Location) -> None:
    """Remove a file or a tree, if it is there."""
    if isinstance(path, ObjectUrl):
        objects.remove(path)
    else:
        local.remove(path)


def unlink(path: Location) -> None:
    """Remove a file, if it is there."""
    if isinstance(path, ObjectUrl):
        objects.unlink(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Location, name: str) -> None:
    """Give a file another name beside it, and the time of now."""
    if isinstance(path, ObjectUrl):
        objects.set_aside(path, name)
    else:
        local.set_aside(path, name)


def is_link(path: Location) -> bool:
    """Whether it leads somewhere else."""
    return not isinstance(path, ObjectUrl) and path.is_symlink()


def read_stamped(path: Location, most: int) -> tuple[bytes, Stamp]:
    """A small file whole, and its stamp.

    Raises:
        StoreError: it is larger than `most` bytes.
        FileNotFoundError: there is none.
    """
    if isinstance(path, ObjectUrl):
        return objects.read_stamped(path, most)
    return local.read_stamped(path, most)


def read_bytes(path: Location, most: int) -> bytes:
    """A small file whole; raises as `read_stamped`."""
    return read_stamped(path, most)[0]


@contextmanager
def open_read(path: Location, size: int | None = None) -> Iterator[OpenFile | OpenObject]:
    """A file to read from; `size`, where known, saves a question to an object store."""
    if isinstance(path, ObjectUrl):
        yield OpenObject(path, size)
        return
    with local.open_read(path) as file:
        yield file


def crc32c_of(path: Location) -> int:
    """crc32c of a whole file."""
    return objects.crc32c_of(path) if isinstance(path, ObjectUrl) else local.crc32c_of(path)


def read_zarr(folder: Location, name: str, rows: slice) -> npt.NDArray[Any]:
    """Rows of an array below a folder, read by zarr-python."""
    if isinstance(folder, ObjectUrl):
        return objects.read_zarr(folder, name, rows)
    return local.read_zarr(folder, name, rows)


def workplace(attempt: Location) -> Path:
    """The local folder to write an attempt in: its own, or one in the system's temporary folder."""
    if isinstance(attempt, ObjectUrl):
        return Path(tempfile.gettempdir(), f"hmil-fast-{attempt.name}")
    return attempt


def make_workplace(folder: Path, attempt: Location) -> None:
    """Make it, for nobody else to read where it is a temporary one."""
    if isinstance(attempt, ObjectUrl):
        folder.mkdir(0o700)
    else:
        local.make_folder(folder)


def settle(folder: Path, attempt: Location) -> None:
    """Bring a finished attempt from its workplace to where it is to be, lastingly."""
    if isinstance(attempt, ObjectUrl):
        keys = local.objects(folder)
        for _ in each(attempt, lambda key: objects.upload(folder / key, attempt / key), keys):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        return
    local.sync_tree(attempt)
    local.touch(attempt)
    local.sync(attempt.parent)
    local.sync(attempt.parent.parent)


def give_up(folder: Path, attempt: Location) -> None:
    """Delete an attempt and its workplace."""
    if isinstance(attempt, ObjectUrl):
        shutil.rmtree(folder, ignore_errors=True)
    remove(attempt)
