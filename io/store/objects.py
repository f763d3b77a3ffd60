"""Every call to an object store that the store makes, through obstore: S3, GCS and Azure.

Objects are written whole, so none is ever seen half. Credentials, region and endpoint come from
the environment: AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME and so on. What fails for a moment is tried again by obstore.
"""

import errno
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from hmil_fast.errors import StoreError
from hmil_fast.io.store.local import Run, Stamp
from hmil_fast.io.store.location import ObjectUrl
from hmil_fast.io.store.object_errors import explained, failed

_PIECE = 16 * 2**20
_MOST = 64 * 2**20


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
                    f"{name} is {url!r}, which is no URL",
                    "Set it to one such as http://127.0.0.1:9000 or https://host, or unset it.",
                )
    with explained(ObjectUrl(root)):
        timeout = timedelta(seconds=seconds)
        return from_url(root, retry_config={"max_retries": retries, "retry_timeout": timeout})


def check(store: ObjectUrl, *, writing: bool) -> None:
    """See within seconds whether the store can be reached and, to write, makes exclusive objects.

    Raises:
        StoreError: it cannot be reached, or creates what is there already.
    """
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


def _no_conditions(store: ObjectUrl) -> StoreError:
    return StoreError(
        f"{store} does not make writes conditional (If-None-Match, If-Match): of two writers both "
        "would win",
        "Give a --store on a server that does (AWS S3, GCS, Azure, MinIO), or a folder.",
    )


def exists(path: ObjectUrl) -> bool:
    """Whether there is such an object."""
    import obstore

    with suppress(FileNotFoundError), explained(path):
        obstore.head(_client(path.root), path.key)
        return True
    return False


def names(folder: ObjectUrl) -> list[str]:
    """Sorted names right below a prefix."""
    import obstore

    with explained(folder):
        found = obstore.list_with_delimiter(_client(folder.root), folder.key or None)
    paths = [*found["common_prefixes"], *(item["path"] for item in found["objects"])]
    return sorted(path.rpartition("/")[2] for path in paths)


def _all(folder: ObjectUrl) -> Iterator[tuple[str, Any]]:
    import obstore

    start = len(folder.key) + 1 if folder.key else 0
    with explained(folder):
        for batch in obstore.list(_client(folder.root), folder.key or None):
            for item in batch:
                yield item["path"][start:], item


def objects(folder: ObjectUrl) -> dict[str, int]:
    """Key → size in bytes of every object below a prefix."""
    return {key: item["size"] for key, item in _all(folder)}


def sizes(folder: ObjectUrl, keys: Sequence[str]) -> dict[str, int]:
    """Sizes in bytes of objects below a prefix.

    Raises:
        FileNotFoundError: one is not there.
    """
    import obstore

    found = objects(folder)
    for key in keys:
        if key not in found:  # a listing may be cut
            path = folder / key
            with explained(path):
                found[key] = obstore.head(_client(path.root), path.key)["size"]
    return {key: found[key] for key in keys}


def stamps(folder: ObjectUrl) -> dict[str, Stamp]:
    """Name → stamp of every object right below a prefix."""
    return {key: _stamp(item) for key, item in _all(folder) if "/" not in key}


def holders(folder: ObjectUrl, name: str) -> list[str]:
    """Sorted names right below a prefix that themselves have an object of that name."""
    found = (key.split("/") for key in objects(folder))
    return sorted(parts[0] for parts in found if len(parts) == 2 and parts[1] == name)


def newest_change(folder: ObjectUrl) -> float:
    """When an object below a prefix was written last, by the server's clock."""
    times = [item["last_modified"].timestamp() for _, item in _all(folder)]
    if not times:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(folder))
    return float(max(times))


def _stamp(meta: Any) -> Stamp:
    # listings and reads differ in quotes, versions and fractions of seconds
    tag = (meta["e_tag"] or "").strip('"')
    return Stamp(meta["last_modified"].timestamp(), tag, meta["e_tag"], meta["version"])


def create_exclusive(path: ObjectUrl, data: bytes) -> bool:
    """Create an object; False when it is there already."""
    import obstore
    from obstore.exceptions import AlreadyExistsError

    try:
        with explained(path, AlreadyExistsError):
            obstore.put(_client(path.root), path.key, data, mode="create")
    except AlreadyExistsError:
        # tried again after a lost reply, it meets what it wrote itself
        with suppress(FileNotFoundError):
            return read_bytes(path, _MOST) == data
        return False
    return True


def replace(path: ObjectUrl, data: bytes) -> None:
    """Write an object whole, over what was there."""
    import obstore

    with explained(path):
        obstore.put(_client(path.root), path.key, data)


def renew(path: ObjectUrl, stamp: Stamp, data: bytes) -> None:
    """Write an object over the version that the stamp is of, and over no other."""
    import obstore
    from obstore.exceptions import PreconditionError

    mode = _while(stamp.e_tag, stamp.version)
    with suppress(PreconditionError), explained(path, PreconditionError):
        obstore.put(_client(path.root), path.key, data, mode=mode)


def _while(e_tag: str | None, version: str | None) -> Any:
    """The mode of a put over this version and no other: S3 and Azure know tags, GCS versions."""
    return {key: tag for key, tag in (("e_tag", e_tag), ("version", version)) if tag}


def upload(file: Path, path: ObjectUrl) -> None:
    """Write a file as an object."""
    import obstore

    with explained(path):
        obstore.put(_client(path.root), path.key, file)


def remove(path: ObjectUrl) -> None:
    """Remove all objects below a prefix, or the one of that name."""
    import obstore

    keys = [(path / key).key for key, _ in _all(path)] or [path.key]
    with suppress(FileNotFoundError), explained(path):
        obstore.delete(_client(path.root), keys)


def unlink(path: ObjectUrl) -> None:
    """Remove an object, if it is there."""
    import obstore

    with suppress(FileNotFoundError), explained(path):
        obstore.delete(_client(path.root), path.key)


def set_aside(path: ObjectUrl, name: str) -> None:
    """Give an object another name; a kill in between leaves both."""
    import obstore

    with explained(path):
        obstore.rename(_client(path.root), path.key, path.with_name(name).key)


def read_stamped(path: ObjectUrl, most: int) -> tuple[bytes, Stamp]:
    """A small object whole, and its stamp.

    Raises:
        StoreError: it is larger than `most` bytes.
        FileNotFoundError: there is none.
    """
    import obstore

    with explained(path):
        found = obstore.get(_client(path.root), path.key)
        size = found.meta["size"]
        if size > most:
            raise StoreError(
                f"{path} is {size:,} bytes, more than the {most:,} allowed",
                "Restore this object from a backup.",
            )
        return bytes(found.bytes()), _stamp(found.meta)


def read_bytes(path: ObjectUrl, most: int) -> bytes:
    """A small object whole; raises as `read_stamped`."""
    return read_stamped(path, most)[0]


class OpenObject:
    """An object to read ranges of.

    Args:
        path: Which.
        size: Its bytes; asked for if not known.
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
        """Fill a few buffers, in turn, from one contiguous run.

        Raises:
            EOFError: the object ends too soon.
        """
        for _ in self.read_runs([(offset, buffers)]):
            pass

    def read_runs(self, runs: Iterable[Run]) -> Iterator[list[npt.NDArray[np.uint8]]]:
        """Fill run after run and give each one's buffers; neighbours come in one request.

        Raises:
            EOFError: the object ends too soon.
        """
        group: list[Run] = []
        for run in runs:
            group.append(run)
            if sum(_bytes(part) for part in group) >= _PIECE:
                yield from self._read(group)
                group = []
        if group:
            yield from self._read(group)

    def _read(self, group: list[Run]) -> Iterator[list[npt.NDArray[np.uint8]]]:
        import obstore

        starts, lengths = [run[0] for run in group], [_bytes(run) for run in group]
        with explained(self._path):
            found = obstore.get_ranges(self._client, self._path.key, starts=starts, lengths=lengths)
        for (_, buffers), data, length in zip(group, found, lengths, strict=True):
            if len(data) != length:
                raise EOFError
            at, flat = 0, np.frombuffer(memoryview(data), np.uint8)
            for buffer in buffers:
                buffer.reshape(-1)[:] = flat[at : at + buffer.size]
                at += buffer.size
            yield buffers


def _bytes(run: Run) -> int:
    return sum(buffer.nbytes for buffer in run[1])


def crc32c_of(path: ObjectUrl) -> int:
    """crc32c of a whole object."""
    import obstore

    crc = 0
    with explained(path):
        for piece in obstore.get(_client(path.root), path.key).stream(min_chunk_size=_PIECE):
            crc = google_crc32c.extend(crc, bytes(piece))
    return crc


def read_zarr(folder: ObjectUrl, name: str, rows: slice) -> npt.NDArray[Any]:
    """Rows of an array, read by zarr-python."""
    import zarr
    from zarr.storage import ObjectStore

    store = ObjectStore(_client(folder.root), read_only=True)
    with explained(folder):
        array: Any = zarr.open_array(store, path=(folder / name).key, mode="r")
        return np.asarray(array[rows])
