"""Backend: the protocol of a place that a store can lie in.

`local.LocalBackend` and `objects.ObjectBackend` follow it; `backend_of` gives that of a location. A
new place needs a class of these methods that passes tests/io/test_backend.py.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import StoreError

A = TypeVar("A")
B = TypeVar("B")
P_contra = TypeVar("P_contra", contravariant=True)

# an offset in a file, and the buffers to fill in turn from there
ReadRun: TypeAlias = tuple[int, list[npt.NDArray[np.uint8]]]


class Stamp(NamedTuple):
    """When a file was written last.

    Attributes:
        time: Seconds since the epoch, by the clock of the disk or the server.
        tag: Changes with every write, whatever the clock says.
        e_tag: Version of an object, for `renew`.
        version: The same where a server counts versions.
    """

    time: float
    tag: int | str
    e_tag: str | None = None
    version: str | None = None


class OpenFile(Protocol):
    """An open file of `size` bytes to read ranges from."""

    size: int

    def read_into(self, offset: int, buffers: list[npt.NDArray[np.uint8]]) -> None:
        """Fill buffers, in turn, from one contiguous range.

        Raises:
            EOFError: the file ends too soon.
        """

    def read_runs(self, runs: Iterable[ReadRun]) -> Iterator[list[npt.NDArray[np.uint8]]]:
        """Fill the buffers of each run and yield them.

        Raises:
            EOFError: the file ends too soon.
        """


class Backend(Protocol[P_contra]):
    """Files below a store, by location (a path or a URL).

    A file appears whole or not at all. Methods raise OSError when the place refuses, and
    FileNotFoundError when a file that they read does not exist. A backend holds no state: it may be
    shared by threads and pickled.

    Attributes:
        poll_s: Seconds to wait before asking again whether a file changed.
    """

    poll_s: float

    def check(self, store: P_contra, *, writing: bool) -> None:
        """Check within seconds that a store can be reached and, to write, that create is exclusive.

        Raises:
            StoreError: it cannot.
        """

    def failed(self, error: OSError, doing: str, path: P_contra) -> StoreError:
        """Return the StoreError that names the place, the reason and a fix."""

    def map(self, task: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Apply a task to every item, in order; several at a time where each waits for a server."""

    def exists(self, path: P_contra) -> bool:
        """Return whether a file or link of that name exists."""

    def is_link(self, path: P_contra) -> bool:
        """Return whether this is a symbolic link."""

    def names(self, folder: P_contra) -> list[str]:
        """Return the sorted names in a folder; empty if it does not exist."""

    def stamps(self, folder: P_contra) -> dict[str, Stamp]:
        """Return name → stamp of the files directly in a folder; empty if it does not exist."""

    def folders_with(self, folder: P_contra, name: str) -> list[str]:
        """Return the sorted names of subfolders that hold a file of that name."""

    def tree(self, folder: P_contra) -> dict[str, int]:
        """Return key ("features/c/0/0") → size in bytes of every file below a folder."""

    def sizes(self, folder: P_contra, keys: Sequence[str]) -> dict[str, int]:
        """Return the sizes in bytes of files below a folder.

        Raises:
            OSError: one does not exist, is not a regular file, or lies outside the folder.
        """

    def newest_change(self, folder: P_contra) -> float:
        """Return the time of the latest change below a folder, in seconds since the epoch.

        Raises:
            FileNotFoundError: it does not exist.
        """

    def free_bytes(self, path: P_contra) -> int | None:
        """Return the free space in bytes; None where it is unknown or has no limit."""

    def make_folder(self, path: P_contra) -> None:
        """Make a folder and its parents, where folders exist."""

    def create_exclusive(self, path: P_contra, data: bytes, *, lasting: bool = True) -> bool:
        """Create a file, whole or not at all; False if it exists already.

        Args:
            path: The file.
            data: Its content.
            lasting: Whether it must survive a power cut.
        """

    def replace(self, path: P_contra, data: bytes) -> None:
        """Write a file over an older one; readers see the old or the new content."""

    def append(self, path: P_contra, data: bytes) -> bool:
        """Append to a file; False where the place cannot append, and nothing is written."""

    def renew(self, path: P_contra, stamp: Stamp, data: bytes) -> None:
        """Give a file a new stamp, unless it was removed or replaced since `stamp` was read.

        Args:
            path: The file.
            stamp: Its stamp when it was read.
            data: Its content, for places that can only write a file again.
        """

    def rename(self, path: P_contra, name: str) -> None:
        """Rename a file within its folder and set its time to now."""

    def unlink(self, path: P_contra) -> None:
        """Remove a file, if it exists."""

    def remove(self, path: P_contra) -> None:
        """Remove a file or everything below a folder, if it exists; links are not followed."""

    def read_stamped(self, path: P_contra, limit: int) -> tuple[bytes, Stamp]:
        """Read a small file whole, with its stamp.

        Raises:
            StoreError: it is larger than `limit` bytes.
        """

    def read_bytes(self, path: P_contra, limit: int) -> bytes:
        """Read a small file whole; raises as `read_stamped`."""
        return self.read_stamped(path, limit)[0]

    def open_read(
        self, path: P_contra, size: int | None = None
    ) -> AbstractContextManager[OpenFile]:
        """Open a file to read ranges; a known `size` saves a request to an object store."""

    def crc32c_of(self, path: P_contra) -> int:
        """Return the crc32c of a whole file."""

    def read_zarr(self, folder: P_contra, name: str, rows: slice) -> npt.NDArray[Any]:
        """Read rows of an array below a folder with zarr-python."""

    def staging(self, attempt: P_contra) -> Path:
        """Return the local folder that an attempt is written in before it is uploaded."""

    def make_staging(self, attempt: P_contra) -> None:
        """Make that folder; one in the system's temporary folder is private (mode 0700)."""

    def finish(self, attempt: P_contra) -> None:
        """Make a written attempt survive a power cut, at its location."""

    def discard(self, attempt: P_contra) -> None:
        """Delete an attempt and its staging folder."""
