"""Files on a local or shared disk: the backend of stores in folders."""

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from hmil_fast.errors import StoreError
from hmil_fast.files import create_file, sync, write_file
from hmil_fast.io.store.protocol import A, B, Backend, ReadRun, Stamp

_PIECE = 8 * 2**20


def failed(error: OSError, doing: str, path: Path) -> StoreError:
    """A StoreError that names the path, the system's reason and the free space."""
    free = free_bytes(path)
    space = "" if free is None else f", {free / 2**20:,.0f} MiB free there"
    return StoreError(
        f"{doing} failed at {path}: {error.strerror or error}{space}",
        "Free some space, raise the quota or fix the permissions (or give another --store); "
        "then run the same command again.",
    )


def free_bytes(path: Path) -> int | None:
    """Free bytes on the file system of the nearest folder that exists; None if unknown."""
    for folder in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def touch(path: Path) -> None:
    """Set a folder's time to now: the sign of life that sweep looks at."""
    os.utime(path)


def sync_tree(folder: Path) -> None:
    """Make a whole tree survive a power cut; zarr-python itself never calls fsync.

    Side by side, because journals flush many at once: a third of the time of one by one.
    """
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sync, [folder, *folder.rglob("*")]))


class LocalFile:
    """An open file to read ranges from.

    Args:
        fd: Its descriptor.
        status: Its fstat.
    """

    def __init__(self, fd: int, status: os.stat_result) -> None:
        self._fd = fd
        self.size = status.st_size
        self.stamp = Stamp(status.st_mtime, status.st_mtime_ns)

    def read_into(self, offset: int, buffers: list[npt.NDArray[np.uint8]]) -> None:
        """Fill buffers, in turn, from one contiguous range.

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

    def read_runs(self, runs: Iterable[ReadRun]) -> Iterator[list[npt.NDArray[np.uint8]]]:
        """Fill the buffers of each run and yield them, to check them while they are in cache."""
        for offset, buffers in runs:
            self.read_into(offset, buffers)
            yield buffers


class LocalBackend(Backend[Path]):
    """Files on a disk of this machine or a shared one (NFS, Lustre)."""

    poll_s = 1.0

    def check(self, store: Path, *, writing: bool) -> None:
        """Check nothing: a disk refuses at once."""

    def failed(self, error: OSError, doing: str, path: Path) -> StoreError:
        """Return a StoreError that names the path, the system's reason and the free space."""
        return failed(error, doing, path)

    def map(self, task: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Apply a task to one item after the other."""
        return map(task, items)

    def is_link(self, path: Path) -> bool:
        """Return whether this is a symbolic link."""
        return path.is_symlink()

    def free_bytes(self, path: Path) -> int | None:
        """Return the free bytes on the disk of the nearest folder that exists."""
        return free_bytes(path.absolute())

    def exists(self, path: Path) -> bool:
        """Return whether something of that name exists; a dangling link does."""
        return os.path.lexists(path)

    def names(self, folder: Path) -> list[str]:
        """Return the sorted names in a folder; empty if there is none."""
        try:
            return sorted(path.name for path in folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def stamps(self, folder: Path) -> dict[str, Stamp]:
        """Return name → stamp of the regular files in a folder; empty if there is none."""
        stamps = {}
        for name in self.names(folder):
            with suppress(FileNotFoundError):
                status = (folder / name).stat()
                if stat.S_ISREG(status.st_mode):
                    stamps[name] = Stamp(status.st_mtime, status.st_mtime_ns)
        return stamps

    def folders_with(self, folder: Path, name: str) -> list[str]:
        """Return the subfolders that hold a file of that name, or that may not be read."""

        def holds(subfolder: str) -> bool:
            try:
                (folder / subfolder / name).lstat()
            except (FileNotFoundError, NotADirectoryError):
                return False
            except OSError:
                pass
            return True

        return [subfolder for subfolder in self.names(folder) if holds(subfolder)]

    def tree(self, folder: Path) -> dict[str, int]:
        """Return key → size in bytes of every file below a folder; an unreadable folder raises."""

        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        sizes = {}
        for parent, _, files in os.walk(folder, onerror=refuse):
            for name in files:
                path = Path(parent, name)
                sizes[path.relative_to(folder).as_posix()] = path.lstat().st_size
        return sizes

    def sizes(self, folder: Path, keys: Sequence[str]) -> dict[str, int]:
        """Return the sizes of files below a folder; links and paths through links are refused."""
        sizes, inside = {}, folder.resolve()
        for key in keys:
            path = folder / key
            if path.parent.resolve() != inside / Path(key).parent:
                raise OSError(errno.EINVAL, "leads out of the attempt", key)
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "a link, a folder, a pipe or a device, not a file", key)
            sizes[key] = status.st_size
        return sizes

    def newest_change(self, folder: Path) -> float:
        """Return the latest modification time below a folder, in seconds since the epoch."""
        newest = os.lstat(folder).st_mtime
        for parent, folders, files in os.walk(folder):
            for name in (*folders, *files):
                with suppress(FileNotFoundError):
                    newest = max(newest, os.lstat(os.path.join(parent, name)).st_mtime)  # noqa: PTH118
        return newest

    def make_folder(self, path: Path) -> None:
        """Make a folder and its parents."""
        path.mkdir(parents=True, exist_ok=True)

    def create_exclusive(self, path: Path, data: bytes, *, lasting: bool = True) -> bool:
        """Create a file, whole or not at all: only a hard link does both in one step."""
        return create_file(path, lambda to: to.write_bytes(data), lasting=lasting)

    def replace(self, path: Path, data: bytes) -> None:
        """Write a file over an older one by renaming."""
        write_file(path, lambda to: to.write_bytes(data), lasting=False)

    def rename(self, path: Path, name: str) -> None:
        """Rename a file within its folder and set its time to now."""
        to = path.with_name(name)
        path.rename(to)
        os.utime(to, follow_symlinks=False)
        sync(path.parent)

    def remove(self, path: Path) -> None:
        """Remove a file or a tree; a link is removed, not followed."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def read_stamped(self, path: Path, limit: int) -> tuple[bytes, Stamp]:
        """Read a small file; it is opened, because on NFS only that asks the server."""
        with self.open_read(path) as file:
            if file.size > limit:
                raise StoreError(
                    f"{path} is {file.size:,} bytes, more than the {limit:,} allowed",
                    "Restore this file from a backup.",
                )
            data = np.empty(file.size, np.uint8)
            file.read_into(0, [data])
            return data.tobytes(), file.stamp

    def crc32c_of(self, path: Path) -> int:
        """Return the crc32c of a whole file."""
        crc = 0
        with self.open_read(path) as file:
            piece = np.empty(min(file.size, _PIECE), np.uint8)
            for offset in range(0, file.size, _PIECE):
                part = piece[: min(_PIECE, file.size - offset)]
                file.read_into(offset, [part])
                crc = google_crc32c.extend(crc, part)
        return crc

    def read_zarr(self, folder: Path, name: str, rows: slice) -> npt.NDArray[Any]:
        """Read rows with zarr-python; imported late, because that takes a third of a second."""
        import zarr
        from zarr.storage import LocalStore

        array: Any = zarr.open_array(LocalStore(folder, read_only=True), path=name, mode="r")
        return np.asarray(array[rows])

    @contextmanager
    def open_read(self, path: Path, size: int | None = None) -> Iterator[LocalFile]:
        """Open a regular file; links, pipes and devices are refused."""
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            yield LocalFile(fd, status)
        finally:
            os.close(fd)

    def append(self, path: Path, data: bytes) -> bool:
        """Append to a file."""
        with path.open("ab") as file:
            file.write(data)
        return True

    def renew(self, path: Path, stamp: Stamp, data: bytes) -> None:
        """Set a file's time to now; its content stays."""
        os.utime(path)

    def unlink(self, path: Path) -> None:
        """Remove a file, if it exists."""
        path.unlink(missing_ok=True)

    def staging(self, attempt: Path) -> Path:
        """Return the attempt's own folder: it is written in place."""
        return attempt

    def make_staging(self, attempt: Path) -> None:
        """Make the attempt's folder."""
        self.make_folder(attempt)

    def finish(self, attempt: Path) -> None:
        """Make an attempt and the folders above it survive a power cut."""
        sync_tree(attempt)
        touch(attempt)
        sync(attempt.parent)
        sync(attempt.parent.parent)

    def discard(self, attempt: Path) -> None:
        """Delete an attempt."""
        self.remove(attempt)
