"""Objects in S3, GCS and Azure, through obstore: the backend of stores at URLs.

Objects are written whole, so readers never see half of one. Credentials, region and endpoint are
those of the environment: AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME and so on. obstore retries requests.
"""

import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from hmil_fast.errors import StoreError
from hmil_fast.io.store import local
from hmil_fast.io.store.location import ObjectUrl
from hmil_fast.io.store.object_errors import explained, failed
from hmil_fast.io.store.protocol import A, B, Backend, ReadRun, Stamp

_PIECE = 16 * 2**20
_MOST = 64 * 2**20
_REQUESTS = 16  # at a time


@lru_cache(maxsize=8)
def _client(root: str, retries: int = 40, seconds: int = 60) -> Any:
    # no longer than that: a process that waits in here hears no signal
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise StoreError(
            f"{root} needs the package obstore", 'Install it: pip install "hmil-fast[objects]".'
        ) from error
    if root.startswith("s3"):
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"):
            url = os.environ.get(name)
            if url is not None and not re.match(r"https?://[^/\s]", url):
                raise StoreError(
                    f"{name} is {url!r}, which is not a URL",
                    "Set it to one such as http://127.0.0.1:9000 or https://host, or unset it.",
                )
    with explained(ObjectUrl(root)):
        timeout = timedelta(seconds=seconds)
        return from_url(root, retry_config={"max_retries": retries, "retry_timeout": timeout})


def _no_conditions(store: ObjectUrl) -> StoreError:
    return StoreError(
        f"{store} does not make writes conditional (If-None-Match, If-Match): of two writers both "
        "would win",
        "Give a --store on a server that does (AWS S3, GCS, Azure, MinIO), or a folder.",
    )


def _all(folder: ObjectUrl) -> Iterator[tuple[str, Any]]:
    import obstore

    start = len(folder.key) + 1 if folder.key else 0
    with explained(folder):
        for batch in obstore.list(_client(folder.root), folder.key or None):
            for item in batch:
                yield item["path"][start:], item


def _stamp(meta: Any) -> Stamp:
    # listings and reads differ in quotes, versions and fractions of seconds
    tag = (meta["e_tag"] or "").strip('"')
    return Stamp(meta["last_modified"].timestamp(), tag, meta["e_tag"], meta["version"])


def _while(e_tag: str | None, version: str | None) -> Any:
    """The mode of a put over this version and no other: S3 and Azure know tags, GCS versions."""
    return {key: tag for key, tag in (("e_tag", e_tag), ("version", version)) if tag}


def _upload(file: Path, path: ObjectUrl) -> None:
    """Write a file as an object."""
    import obstore

    with explained(path):
        obstore.put(_client(path.root), path.key, file)


class OpenObject:
    """An object to read ranges from.

    Args:
        path: Its URL.
        size: Its bytes; None asks the server.
    """

    def __init__(self, path: ObjectUrl, size: int | None) -> None:
        import obstore

        self._path = path
        self._client = _client(path.root)
        if size is None:
            with explained(path):
                size = obstore.head(self._client, path.key)["size"]
        self.size = size

    def read_into(self, offset: int, buffers: list[npt.NDArray[np.uint8]]) -> None:
        """Fill buffers, in turn, from one contiguous range.

        Raises:
            EOFError: the object ends too soon.
        """
        for _ in self.read_runs([(offset, buffers)]):
            pass

    def read_runs(self, runs: Iterable[ReadRun]) -> Iterator[list[npt.NDArray[np.uint8]]]:
        """Fill the buffers of each run and yield them; up to 16 MiB of runs come in one request.

        Raises:
            EOFError: the object ends too soon.
        """
        group: list[ReadRun] = []
        for run in runs:
            group.append(run)
            if sum(_bytes(part) for part in group) >= _PIECE:
                yield from self._read(group)
                group = []
        if group:
            yield from self._read(group)

    def _read(self, group: list[ReadRun]) -> Iterator[list[npt.NDArray[np.uint8]]]:
        import obstore

        starts, lengths = [run[0] for run in group], [_bytes(run) for run in group]
        with explained(self._path):
            pieces = obstore.get_ranges(
                self._client, self._path.key, starts=starts, lengths=lengths
            )
        for (_, buffers), data, length in zip(group, pieces, lengths, strict=True):
            if len(data) != length:
                raise EOFError
            at, flat = 0, np.frombuffer(memoryview(data), np.uint8)
            for buffer in buffers:
                buffer.reshape(-1)[:] = flat[at : at + buffer.size]
                at += buffer.size
            yield buffers


def _bytes(run: ReadRun) -> int:
    return sum(buffer.nbytes for buffer in run[1])


class ObjectBackend(Backend[ObjectUrl]):
    """Objects below a prefix of a bucket or container.

    Attempts are written in a local folder, checked there, and uploaded whole.
    """

    poll_s = 10.0  # many who wait for the last slides of a job must not flood a server

    def failed(self, error: OSError, doing: str, path: ObjectUrl) -> StoreError:
        """Return a StoreError that names the URL, or the staging folder where that one failed."""
        if "://" in str(error.filename):
            return failed(error, doing, path)
        return local.failed(error, doing, Path(tempfile.gettempdir()))

    def map(self, task: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Apply a task to every item, 16 at a time: each waits for the server."""
        with ThreadPoolExecutor(_REQUESTS) as pool:
            yield from pool.map(task, items)

    def is_link(self, path: ObjectUrl) -> bool:
        """Return False: there are no links."""
        return False

    def free_bytes(self, path: ObjectUrl) -> int | None:
        """Return None: a bucket has no limit."""
        return None

    def make_folder(self, path: ObjectUrl) -> None:
        """Make nothing: object stores have no folders."""

    def append(self, path: ObjectUrl, data: bytes) -> bool:
        """Return False: objects cannot be appended to."""
        return False

    @contextmanager
    def open_read(self, path: ObjectUrl, size: int | None = None) -> Iterator[OpenObject]:
        """Open an object to read ranges."""
        yield OpenObject(path, size)

    def staging(self, attempt: ObjectUrl) -> Path:
        """Return the folder in the system's temporary folder that an attempt is written in."""
        return Path(tempfile.gettempdir(), f"hmil-fast-{attempt.name}")

    def make_staging(self, attempt: ObjectUrl) -> None:
        """Make that folder, private to this user."""
        self.staging(attempt).mkdir(0o700)

    def finish(self, attempt: ObjectUrl) -> None:
        """Upload an attempt and delete its staging folder."""
        folder = self.staging(attempt)
        keys = local.LocalBackend().tree(folder)
        for _ in self.map(lambda key: _upload(folder / key, attempt / key), keys):
            pass
        shutil.rmtree(folder, ignore_errors=True)

    def discard(self, attempt: ObjectUrl) -> None:
        """Delete an attempt and its staging folder."""
        shutil.rmtree(self.staging(attempt), ignore_errors=True)
        self.remove(attempt)

    def check(self, store: ObjectUrl, *, writing: bool) -> None:
        """Check within seconds that the server answers and, to write, creates exclusively."""
        try:
            client = _client(store.root, 2, 10)
            import obstore
            from obstore.exceptions import AlreadyExistsError, BaseError

            with suppress(FileNotFoundError), explained(store):
                obstore.get(client, "store.json").meta  # noqa: B018  # asks; the body is left
            if not writing:
                return
            probe = f"probe-{uuid.uuid4().hex}"
            with explained(store):
                made = obstore.put(client, probe, b"1", mode="create")
            try:
                obstore.put(client, probe, b"2", mode=_while(made["e_tag"], made["version"]))
                obstore.put(client, probe, b"3", mode="create")
            except AlreadyExistsError:
                return
            except BaseError as error:
                raise _no_conditions(store) from error
            finally:
                with suppress(BaseError):
                    obstore.delete(client, probe)
            raise _no_conditions(store)
        except OSError as error:
            raise failed(error, "opening the store", store) from error

    def exists(self, path: ObjectUrl) -> bool:
        """Return whether there is such an object."""
        import obstore

        with suppress(FileNotFoundError), explained(path):
            obstore.head(_client(path.root), path.key)
            return True
        return False

    def names(self, folder: ObjectUrl) -> list[str]:
        """Return the sorted names directly below a prefix."""
        import obstore

        with explained(folder):
            listing = obstore.list_with_delimiter(_client(folder.root), folder.key or None)
        paths = [*listing["common_prefixes"], *(item["path"] for item in listing["objects"])]
        return sorted(path.rpartition("/")[2] for path in paths)

    def stamps(self, folder: ObjectUrl) -> dict[str, Stamp]:
        """Return name → stamp of the objects directly below a prefix."""
        return {key: _stamp(item) for key, item in _all(folder) if "/" not in key}

    def folders_with(self, folder: ObjectUrl, name: str) -> list[str]:
        """Return the sorted names directly below a prefix that hold an object of that name."""
        keys = (key.split("/") for key in self.tree(folder))
        return sorted(parts[0] for parts in keys if len(parts) == 2 and parts[1] == name)

    def tree(self, folder: ObjectUrl) -> dict[str, int]:
        """Return key → size in bytes of every object below a prefix."""
        return {key: item["size"] for key, item in _all(folder)}

    def sizes(self, folder: ObjectUrl, keys: Sequence[str]) -> dict[str, int]:
        """Return the sizes in bytes of objects below a prefix."""
        import obstore

        sizes = self.tree(folder)
        for key in keys:
            if key not in sizes:  # a listing may be cut
                path = folder / key
                with explained(path):
                    sizes[key] = obstore.head(_client(path.root), path.key)["size"]
        return {key: sizes[key] for key in keys}

    def newest_change(self, folder: ObjectUrl) -> float:
        """Return when an object below a prefix was written last, by the server's clock."""
        times = [item["last_modified"].timestamp() for _, item in _all(folder)]
        if not times:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(folder))
        return float(max(times))

    def create_exclusive(self, path: ObjectUrl, data: bytes, *, lasting: bool = True) -> bool:
        """Create an object; False if it exists already. Every object survives a power cut."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            with explained(path, AlreadyExistsError):
                obstore.put(_client(path.root), path.key, data, mode="create")
        except AlreadyExistsError:
            # tried again after a lost reply, it meets what it wrote itself
            with suppress(FileNotFoundError):
                return self.read_bytes(path, _MOST) == data
            return False
        return True

    def replace(self, path: ObjectUrl, data: bytes) -> None:
        """Write an object over an older one."""
        import obstore

        with explained(path):
            obstore.put(_client(path.root), path.key, data)

    def renew(self, path: ObjectUrl, stamp: Stamp, data: bytes) -> None:
        """Write an object over the version that the stamp names, and over no other."""
        import obstore
        from obstore.exceptions import PreconditionError

        mode = _while(stamp.e_tag, stamp.version)
        with suppress(PreconditionError), explained(path, PreconditionError):
            obstore.put(_client(path.root), path.key, data, mode=mode)

    def rename(self, path: ObjectUrl, name: str) -> None:
        """Copy an object to another name and delete it; a kill in between leaves both."""
        import obstore

        with explained(path):
            obstore.rename(_client(path.root), path.key, path.with_name(name).key)

    def unlink(self, path: ObjectUrl) -> None:
        """Remove an object, if it exists."""
        import obstore

        with suppress(FileNotFoundError), explained(path):
            obstore.delete(_client(path.root), path.key)

    def remove(self, path: ObjectUrl) -> None:
        """Remove all objects below a prefix, or the one of that name."""
        import obstore

        keys = [(path / key).key for key, _ in _all(path)] or [path.key]
        with suppress(FileNotFoundError), explained(path):
            obstore.delete(_client(path.root), keys)

    def read_stamped(self, path: ObjectUrl, limit: int) -> tuple[bytes, Stamp]:
        """Read a small object whole, with its stamp."""
        import obstore

        with explained(path):
            reply = obstore.get(_client(path.root), path.key)
            size = reply.meta["size"]
            if size > limit:
                raise StoreError(
                    f"{path} is {size:,} bytes, more than the {limit:,} allowed",
                    "Restore this object from a backup.",
                )
            return bytes(reply.bytes()), _stamp(reply.meta)

    def crc32c_of(self, path: ObjectUrl) -> int:
        """Return the crc32c of a whole object."""
        import obstore

        crc = 0
        with explained(path):
            for piece in obstore.get(_client(path.root), path.key).stream(min_chunk_size=_PIECE):
                crc = google_crc32c.extend(crc, bytes(piece))
        return crc

    def read_zarr(self, folder: ObjectUrl, name: str, rows: slice) -> npt.NDArray[Any]:
        """Read rows of an array below a prefix with zarr-python."""
        import zarr
        from zarr.storage import ObjectStore

        store = ObjectStore(_client(folder.root), read_only=True)
        with explained(folder):
            array: Any = zarr.open_array(store, path=(folder / name).key, mode="r")
            return np.asarray(array[rows])
