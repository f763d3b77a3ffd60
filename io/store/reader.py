"""Read one attempt straight from its shards into the caller's memory, checksums verified.

zarr-python takes about five times as long for the same bytes. Arrays laid out in a way this
reader does not know are handed to zarr-python.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from hmil_fast.errors import DamagedError, StoreError
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.layout import CRC_BYTES, MAX_FILE_BYTES
from hmil_fast.io.store.location import Location
from hmil_fast.io.store.protocol import OpenFile, ReadRun
from hmil_fast.io.store.schema import SlideRecord, features_name, parse_json

_INDEX_ENTRY = 16
_DTYPES = ("float16", "float32", "uint16", "int32", "uint8")
_BYTES_CRC = ["bytes", "crc32c"]
# a layout we do not know may be compressed; more than this is taken for an attack
_MOST_COMPRESSION = 16


@dataclass(frozen=True)
class ArrayLayout:
    """Where the rows of a zarr v3 array lie: blocks (files) of whole chunks of whole rows."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk: int
    block: int
    index_at: str | None  # "start" or "end" of a shard; None: a block is one bare chunk
    plain: bool  # False: codecs that only zarr-python knows
    decoded: int  # bytes of one decoded block, padding included

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the array in memory."""
        return self.shape[0] * self.row_bytes

    @property
    def blocks(self) -> int:
        """Number of blocks, each a file."""
        return -(-self.shape[0] // self.block)

    def key(self, block: int) -> str:
        """Key of a block's file below the array."""
        return "/".join(["c", str(block), *["0"] * (len(self.shape) - 1)])

    def rows(self, block: int) -> slice:
        """The rows that lie in a block."""
        return slice(block * self.block, min((block + 1) * self.block, self.shape[0]))


def parse_layout(meta: dict[str, Any]) -> ArrayLayout:
    """The layout that an array's zarr.json tells of.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, ArithmeticError: the metadata are not
            those of a zarr v3 array.
    """
    shape = tuple(int(n) for n in meta["shape"])
    if meta["data_type"] not in _DTYPES or not 1 <= len(shape) <= 2 or min(shape) < 0:
        raise ValueError(f"{meta['data_type']} of shape {shape}")
    dtype = np.dtype(meta["data_type"]).newbyteorder("<")
    outer = [int(n) for n in meta["chunk_grid"]["configuration"]["chunk_shape"]]
    inner, codecs, index_at = outer, meta["codecs"], None
    plain = meta["chunk_key_encoding"] in (
        {"name": "default"},
        {"name": "default", "configuration": {"separator": "/"}},
    )
    if codecs[0]["name"] == "sharding_indexed":
        sharding = codecs[0]["configuration"]
        plain &= len(codecs) == 1 and _plain(sharding["index_codecs"])
        inner, codecs = [int(n) for n in sharding["chunk_shape"]], sharding["codecs"]
        index_at = sharding.get("index_location", "end")
    plain &= _plain(codecs) and index_at in (None, "start", "end")
    plain &= outer[1:] == inner[1:] == list(shape[1:]) and not meta.get("storage_transformers")
    if min(inner[0], outer[0]) < 1 or outer[0] % inner[0]:
        raise ValueError(f"chunks of {inner[0]} rows in shards of {outer[0]}")
    decoded = math.prod(outer) * dtype.itemsize
    return ArrayLayout(shape, dtype, inner[0], outer[0], index_at, plain, decoded)


def _plain(codecs: list[dict[str, Any]]) -> bool:
    endian = codecs[0].get("configuration", {}).get("endian", "little")
    return [codec["name"] for codec in codecs] == _BYTES_CRC and endian == "little"


class AttemptReader:
    """The arrays of one committed attempt.

    Args:
        folder: The attempt's folder.
        record: What its commit says; sizes on disk must agree with it before anything is
            allocated.
        prefix: What the names of a coarser scale's arrays begin with; `record` is then of it.
        view: Which features are read, 0 being those of the tiles as they are.
    """

    def __init__(
        self, folder: Location, record: SlideRecord, prefix: str = "", view: int = 0
    ) -> None:
        self.folder = folder
        self._backend = backend_of(folder)
        self.record = record
        self.features = f"{prefix}{features_name(view)}"
        self.prefix = prefix
        self.view = view
        self._sizes = {stored.key: stored.bytes for stored in record.objects}
        self._layouts: dict[str, ArrayLayout] = {}

    def views(self) -> list["AttemptReader"]:
        """Readers of the slide's further views, the first one first."""
        found: list[AttemptReader] = []
        while f"{self.prefix}{features_name(len(found) + 1)}/zarr.json" in self._sizes:
            found.append(AttemptReader(self.folder, self.record, self.prefix, len(found) + 1))
        return found

    def layout(self, name: str) -> ArrayLayout:
        """Layout of an array whose objects are all there, in sizes that can hold its rows."""
        if name not in self._layouts:
            path = self.folder / name / "zarr.json"
            try:
                layout = parse_layout(
                    parse_json(self._backend.read_bytes(path, MAX_FILE_BYTES), path)
                )
            except OSError as error:
                raise self.failed(error, f"{name}/zarr.json") from error
            except StoreError as error:
                raise self.damaged(error.what) from error
            except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
                raise self.damaged(f"{name}/zarr.json is malformed: {error!r}") from error
            self._check_sizes(name, layout)
            self._layouts[name] = layout
        return self._layouts[name]

    def _check_sizes(self, name: str, layout: ArrayLayout) -> None:
        keys = [key for key in self._sizes if key.startswith(f"{name}/c/")]
        try:
            found = self._backend.sizes(self.folder, keys)
        except OSError as error:
            raise self.failed(error, error.filename) from error
        for key, size in found.items():
            if size != self._sizes[key]:
                raise self.damaged(f"{key} is {size} bytes, committed were {self._sizes[key]}")
        held = sum(found.values())
        claimed = layout.bytes if layout.plain else max(layout.bytes, layout.decoded)
        if claimed > held * (1 if layout.plain else _MOST_COMPRESSION):
            raise self.damaged(f"{name!r} claims {claimed:,} bytes, its files hold {held:,}")

    def features_layout(self) -> ArrayLayout:
        """Layout of the features, checked against the record's N and D."""
        layout = self.layout(self.features)
        if layout.shape != (self.record.num_tiles, self.record.dim):
            raise self.damaged(
                f"features are {layout.shape}, the commit says "
                f"{(self.record.num_tiles, self.record.dim)}"
            )
        return layout

    def coords(self) -> npt.NDArray[np.int32]:
        """Coordinates [N, 2]."""
        return self._rows(f"{self.prefix}coords", (2,), np.int32)

    def status(self) -> npt.NDArray[np.uint8]:
        """Status [N]."""
        return self._rows(f"{self.prefix}status", (), np.uint8)

    def parent(self) -> npt.NDArray[np.int32]:
        """Parent [N]: the row of the next coarser scale's tile that each tile lies in."""
        return self._rows(f"{self.prefix}parent", (), np.int32)

    def _rows(self, name: str, tail: tuple[int, ...], dtype: type[Any]) -> npt.NDArray[Any]:
        layout = self.layout(name)
        wanted = (self.record.num_tiles, *tail)
        if layout.shape != wanted or layout.dtype != dtype:
            raise self.damaged(f"{name!r} is {layout.dtype} {layout.shape}, not {wanted}")
        return self.read(name)

    def read(self, name: str) -> npt.NDArray[Any]:
        """A whole array, in a new numpy array."""
        layout = self.layout(name)
        out = np.empty(layout.shape, layout.dtype)
        for work in self.work(name, out):
            work()
        return out

    def work(self, name: str, out: npt.NDArray[Any]) -> Iterator[Callable[[], None]]:
        """The reads that fill `out` (contiguous, the array's shape and dtype), one per block."""
        layout = self.layout(name)
        for block in range(layout.blocks):
            yield partial(self.read_block, name, block, out[layout.rows(block)])

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows from `start` to before `stop`; the chunks that they lie in are read and verified."""
        layout = self.layout(name)
        first = start // layout.chunk * layout.chunk
        last = min(math.ceil(stop / layout.chunk) * layout.chunk, layout.shape[0])
        out = np.empty((last - first, *layout.shape[1:]), layout.dtype)
        for block in range(first // layout.block, math.ceil(last / layout.block)):
            rows = layout.rows(block)
            lo, hi = max(first, rows.start), min(last, rows.stop)
            self.read_block(name, block, out[lo - first : hi - first], lo - rows.start)
        return out[start - first : stop - first]

    def read_block(self, name: str, block: int, out: npt.NDArray[Any], skip: int = 0) -> None:
        """Fill `out` with rows of one block, past `skip` (whole chunks); checksums are verified."""
        layout = self.layout(name)
        if not layout.plain:
            start = block * layout.block + skip
            out[...] = self._by_zarr(name, slice(start, start + len(out)))
            return
        key = f"{name}/{layout.key(block)}"
        flat = out.view(np.uint8).reshape(len(out), layout.row_bytes)
        chunks = slice(skip // layout.chunk, math.ceil((skip + len(out)) / layout.chunk))
        try:
            with self._backend.open_read(self.folder / key, self._sizes.get(key)) as file:
                where = _chunk_offsets(file, layout, chunks.stop)
                _read_chunks(file, where, chunks, layout, flat)
        except OSError as error:
            raise self.failed(error, key) from error
        except EOFError as error:
            raise self.damaged(f"{key} ends too soon") from error
        except ValueError as error:
            raise self.damaged(f"{key}: {error}") from error

    def _by_zarr(self, name: str, rows: slice) -> npt.NDArray[Any]:
        try:
            return self._backend.read_zarr(self.folder, name, rows)
        except OSError as error:
            raise self.failed(error, name) from error
        except (ValueError, KeyError, RuntimeError) as error:
            raise self.damaged(f"zarr cannot read {name!r}: {error}") from error

    def failed(self, error: OSError, key: str) -> StoreError:
        """The error for a file that cannot be read: damage only where it is not there."""
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return self.damaged(f"{key}: {error.strerror}")
        return StoreError(
            f"slide {self.record.slide_id!r} cannot be read from the store: "
            f"{key}: {error.strerror or error} ({self.folder})",
            f"{getattr(error, 'fix', 'Check permissions, links and disk, then try again.')} "
            f"If the file is lost, run `hmil-fast store drop {self._store()}` with this slide's "
            "id, and extract it again.",
        )

    def _store(self) -> Location:
        return self.folder.parent.parent.parent

    def damaged(self, why: str) -> DamagedError:
        """The error for a slide whose files are not what its commit says."""
        return DamagedError(
            f"slide {self.record.slide_id!r} is damaged in the store: {why} ({self.folder})",
            f"ReadRun `hmil-fast store repair {self._store()}`, then extract this slide again.",
        )


def _chunk_offsets(file: OpenFile, layout: ArrayLayout, used: int) -> npt.NDArray[np.int64]:
    """Offsets of the first `used` chunks of a block, checked to lie inside the file."""
    length, size = layout.chunk * layout.row_bytes + CRC_BYTES, file.size
    if size < length:
        raise ValueError(f"{size} bytes cannot hold a chunk of {length}")
    if layout.index_at is None:
        index = np.array([[0, length]], np.uint64)
    else:
        entries = layout.block // layout.chunk
        index_bytes = entries * _INDEX_ENTRY + CRC_BYTES
        if index_bytes > size:
            raise ValueError(f"{size} bytes cannot hold an index of {index_bytes}")
        raw = np.empty(index_bytes, np.uint8)
        file.read_into(0 if layout.index_at == "start" else size - index_bytes, [raw])
        if google_crc32c.value(raw[:-CRC_BYTES]) != int(raw[-CRC_BYTES:].view("<u4")[0]):
            raise ValueError("the checksum of the shard index is wrong")
        index = raw[:-CRC_BYTES].view("<u8").reshape(entries, 2)[:used]
    if (index[:, 1] != length).any() or (index[:, 0] > size - length).any():
        raise ValueError("a chunk is missing, of a wrong length, or outside the file")
    return index[:, 0].astype(np.int64)


def _read_chunks(
    file: OpenFile,
    where: npt.NDArray[np.int64],
    chunks: slice,
    layout: ArrayLayout,
    out: npt.NDArray[np.uint8],
) -> None:
    """Fill `out` (rows, bytes) chunk by chunk, so that checksums are taken from a warm cache."""
    crc = np.empty(CRC_BYTES, np.uint8)

    def runs() -> Iterator[ReadRun]:
        for i, offset in enumerate(where[chunks].tolist()):
            part = out[i * layout.chunk : (i + 1) * layout.chunk].reshape(-1)
            padding = np.empty(layout.chunk * layout.row_bytes - part.size, np.uint8)
            yield offset, [part, padding, crc]

    for i, (part, padding, stored) in enumerate(file.read_runs(runs())):
        if google_crc32c.extend(google_crc32c.value(part), padding) != int(stored.view("<u4")[0]):
            raise ValueError(f"the checksum of chunk {chunks.start + i} is wrong")
