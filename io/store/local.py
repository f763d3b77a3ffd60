"""Every call to the file system that the store makes; `objects` is the same for object stores."""

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import google_crc32c
import numpy as np
import numpy.typing as npt

from hmil_fast.errors import StoreError

_PIECE = 8 * 2**20

# an offset, and the buffers to fill in turn from there
Run: TypeAlias = tuple[int, list[npt.NDArray[np.uint8]]]


class Stamp(NamedTuple):
    """When a file was written last.

    Attributes:
        time: Seconds since the epoch, by the clock of the disk or the server.
        tag: Another one after every write, whatever the clock says.
        e_tag: Version of an object, for `renew`.
        version: The same where a server counts versions.
    """

    time: float
    tag: int | str
    e_tag: str | None = None
    version: str | None = None


def failed(error: OSError, doing: str, path: Path) -> StoreError:
    """A StoreError that names the path, the system's reason and the free space."""
    free = free_bytes(path)
    space = "" if free is None else f", {free / 2**20:,.0f} MiB free there"
    return StoreError(
        f"{doing} failed at {path}: {error.strerror or error}{space}",
        "Free some space, raise the quota or mend the permissions (or give another --store); "
        "then run the same command again.",
    )


def free_bytes(path: Path) -> int | None:
    """Free bytes on the file system of the nearest folder that exists; None if unknown."""
    for folder in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def exists(path: Path) -> bool:
    """Whether something of that name exists (a dangling link does)."""
    return os.path.lexists(path)


def names(folder: Path) -> list[str]:
    """Sorted names in a folder; empty when there is none."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def stamps(folder: Path) -> dict[str, Stamp]:
    """Name → stamp of every file in a folder; empty when there is none."""
    found = {}
    for name in names(folder):
        with suppress(FileNotFoundError):
            status = (folder / name).stat()
            if stat.S_ISREG(status.st_mode):
                found[name] = Stamp(status.st_mtime, status.st_mtime_ns)
    return found


def holders(folder: Path, name: str) -> list[str]:
    """Sorted names of the folders in a folder that hold a file of that name, or may not be read."""

    def holds(found: str) -> bool:
        try:
            (folder / found / name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            pass
        return True

    return [found for found in names(folder) if holds(found)]


def make_folder(path: Path) -> None:
    """Make a folder and its parents."""
    path.mkdir(parents=True, exist_ok=True)


def touch(path: Path) -> None:
    """Set a folder's time to now: the sign of life that sweep looks at."""
    os.utime(path)


def newest_change(folder: Path) -> float:
    """Latest modification time in a tree, seconds since the epoch."""
    newest = os.lstat(folder).st_mtime
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):
                newest = max(newest, os.lstat(os.path.join(parent, name)).st_mtime)  # noqa: PTH118
    return newest


def objects(folder: Path) -> dict[str, int]:
    """Key ("features/c/0/0") → size in bytes of every file in a tree.

    Raises:
        OSError: a folder in it may not be read.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    found = {}
    for parent, _, files in os.walk(folder, onerror=refuse):
        for name in files:
            path = Path(parent, name)
            found[path.relative_to(folder).as_posix()] = path.lstat().st_size
    return found


def sizes(folder: Path, keys: Iterable[str]) -> dict[str, int]:
    """Sizes in bytes of files in a tree, none of them a link or reached by one.

    Raises:
        OSError: one is not there, is no regular file, or leads out of the folder.
    """
    found, inside = {}, folder.resolve()
    for key in keys:
        path = folder / key
        if path.parent.resolve() != inside / Path(key).parent:
            raise OSError(errno.EINVAL, "leads out of the attempt", key)
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "a link, a folder, a pipe or a device, not a file", key)
        found[key] = status.st_size
    return found


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Make a whole tree survive a power cut; zarr-python itself never calls fsync.

    Side by side, because journals flush many at once: a third of the time of one by one.
    """
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sync, [folder, *folder.rglob("*")]))


def create_exclusive(path: Path, data: bytes, *, lasting: bool = True) -> bool:
    """Create a file whole or not at all; False when it is there already.

    A hard link is the one step that either makes the full file appear or fails.

    Args:
        path: The file.
        data: What it is to hold.
        lasting: Whether it must survive a power cut.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            # over NFS a link may succeed and its reply be lost: then the file has two names
            return temporary.stat().st_nlink == 2
    finally:
        temporary.unlink(missing_ok=True)
    if lasting:
        sync(path.parent)
    return True


def replace(path: Path, data: bytes) -> None:
    """Write a file over what was there; readers see the old one or the new one."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file or a tree; links are removed, never followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path, name: str) -> None:
    """Give a file another name in its folder, and the time of now."""
    to = path.with_name(name)
    path.rename(to)
    os.utime(to, follow_symlinks=False)
    sync(path.parent)


def read_stamped(path: Path, most: int) -> tuple[bytes, Stamp]:
    """A small file whole, and its stamp.

    Opened, not merely looked up: on NFS only that asks the server.

    Raises:
        StoreError: it is larger than `most` bytes.
        FileNotFoundError: there is none.
    """
    with open_read(path) as file:
        if file.size > most:
            raise StoreError(
                f"{path} is {file.size:,} bytes, more than the {most:,} allowed",
                "Restore this file from a backup.",
            )
        data = np.empty(file.size, np.uint8)
        file.read_into(0, [data])
        return data.tobytes(), file.stamp


class OpenFile:
    """A file to read from.

    Args:
        fd: Its descriptor.
        found: What the system says of it.
    """

    def __init__(self, fd: int, found: os.stat_result) -> None:
        self._fd = fd
        self.size = found.st_size
        self.stamp = Stamp(found.st_mtime, found.st_mtime_ns)

    def read_into(self, offset: int, buffers: list[npt.NDArray[np.uint8]]) -> None:
        """Fill a few buffers, in turn, from one contiguous run.

        Raises:
            EOFError: the file ends too soon.
        """
        views = [b.data.cast("B") for b in buffers if b.size]
        while views:
            got = os.preadv(self._fd, views, offset)
            if got == 0:
                raise EOFError
            offset += got
            while views and got >= len(views[0]):
                got -= len(views.pop(0))
            if got:
                views[0] = views[0][got:]

    def read_runs(self, runs: Iterable[Run]) -> Iterator[list[npt.NDArray[np.uint8]]]:
        """Fill run after run and give each one's buffers, to check them from a warm cache."""
        for offset, buffers in runs:
            self.read_into(offset, buffers)
            yield buffers


@contextmanager
def open_read(path: Path) -> Iterator[OpenFile]:
    """An object to read from; links, pipes and devices are refused."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield OpenFile(fd, found)
    finally:
        os.close(fd)


def crc32c_of(path: Path) -> int:
    """crc32c of a whole file."""
    crc = 0
    with open_read(path) as file:
        piece = np.empty(min(file.size, _PIECE), np.uint8)
        for offset in range(0, file.size, _PIECE):
            part = piece[: min(_PIECE, file.size - offset)]
            file.read_into(offset, [part])
            crc = google_crc32c.extend(crc, part)
    return crc


def read_zarr(folder: Path, name: str, rows: slice) -> npt.NDArray[Any]:
    """Rows of an array, read by zarr-python; imported late, it takes a third of a second."""
    import zarr
    from zarr.storage import LocalStore

    array: Any = zarr.open_array(LocalStore(folder, read_only=True), path=name, mode="r")
    return np.asarray(array[rows])
