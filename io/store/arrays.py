"""Write the zarr v3 group of an attempt, which any zarr reader opens.

Written by ourselves: its metadata are a few lines of JSON, and for a small slide zarr-python takes
more time than all the rest of the commit.
"""

import json
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from hmil_fast.io.store.layout import CRC_BYTES, chunk_rows
from hmil_fast.io.store.schema import StoreSpec

_INDEX_ENTRY = struct.Struct("<QQ")
_NO_CHUNK = b"\xff" * _INDEX_ENTRY.size
_CRC = struct.Struct("<I")


class Group:
    """A zarr group in a folder.

    Args:
        folder: There already, empty.
        attributes: Of the group.
    """

    def __init__(self, folder: Path, attributes: dict[str, Any]) -> None:
        self._folder = folder
        self._made = {""}
        self._write_group("", attributes)

    def features(self, name: str, num_tiles: int, shard: int, spec: StoreSpec) -> "FeatureArray":
        """The array [N, D], in shards of that many rows."""
        chunk = chunk_rows(num_tiles)
        codecs = _codecs(spec.stored_dtype)
        sharding = {
            "chunk_shape": [chunk, spec.dim],
            "codecs": codecs,
            "index_codecs": _codecs(np.dtype("<u8")),
            "index_location": "end",
        }
        folder = self._array(
            name,
            (num_tiles, spec.dim),
            spec.stored_dtype,
            chunk_shape=[shard, spec.dim],
            codecs=[{"name": "sharding_indexed", "configuration": sharding}],
            attributes={"dtype_logical": spec.dtype},
        )
        return FeatureArray(folder, shard, chunk, spec)

    def small(self, name: str, values: npt.NDArray[Any]) -> None:
        """An array [n] or [n, k] of one chunk, with its values."""
        folder = self._array(
            name,
            values.shape,
            values.dtype,
            chunk_shape=[max(1, len(values)), *values.shape[1:]],
            codecs=_codecs(values.dtype),
            attributes={},
        )
        if len(values):
            data = _bytes(values)
            path = folder.joinpath("c", *["0"] * values.ndim)
            path.parent.mkdir(parents=True)
            with path.open("xb") as file:
                file.write(data)
                file.write(_CRC.pack(google_crc32c.value(data)))

    def _array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], **about: Any) -> Path:
        *parents, _ = name.split("/")
        for depth in range(1, len(parents) + 1):
            self._write_group("/".join(parents[:depth]), {})
        zero = 0.0 if dtype.kind == "f" else 0
        metadata = {
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": about.pop("chunk_shape")},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": zero,
            **about,
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }
        folder = self._folder / name
        folder.mkdir()
        (folder / "zarr.json").write_text(json.dumps(metadata, indent=2))
        return folder

    def _write_group(self, name: str, attributes: dict[str, Any]) -> None:
        if name and name in self._made:
            return
        self._made.add(name)
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        metadata = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
        (folder / "zarr.json").write_text(json.dumps(metadata, indent=2))


class FeatureArray:
    """A zarr array [N, D] that is written whole shards at a time."""

    def __init__(self, folder: Path, shard: int, chunk: int, spec: StoreSpec) -> None:
        self._folder, self._shard, self._chunk = folder, shard, chunk
        self._row = np.dtype((spec.stored_dtype, (spec.dim,)))

    def write(self, start: int, rows: npt.NDArray[Any]) -> None:
        """Write the shard that begins at row `start`; only the array's last one may be short."""
        path = self._path(start)
        path.parent.mkdir(parents=True, exist_ok=True)
        length = self._chunk * self._row.itemsize
        index = b""
        with path.open("wb") as file:
            # a chunk is full in zarr also where the array ends in it
            for at in range(0, len(rows), self._chunk):
                part = _bytes(rows[at : at + self._chunk])
                padding = bytes(length - len(part))
                crc = google_crc32c.extend(google_crc32c.value(part), padding)
                file.write(part)
                file.write(padding + _CRC.pack(crc))
                number = at // self._chunk
                index += _INDEX_ENTRY.pack(number * (length + CRC_BYTES), length + CRC_BYTES)
            beyond = self._shard // self._chunk - -(-len(rows) // self._chunk)
            index += _NO_CHUNK * beyond
            file.write(index + _CRC.pack(google_crc32c.value(index)))

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows of the shard that begins at `start`, as they were written."""
        length = self._chunk * self._row.itemsize + CRC_BYTES
        count = -(-(stop - start) // self._chunk)
        raw = np.fromfile(self._path(start), np.uint8, count * length).reshape(count, length)
        rows = raw[:, :-CRC_BYTES].reshape(-1).view(self._row.base)
        return rows.reshape(-1, *self._row.shape)[: stop - start]

    def _path(self, start: int) -> Path:
        return self._folder / "c" / str(start // self._shard) / "0"


def _codecs(dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    endian = {"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {}
    return [{"name": "bytes", **endian}, {"name": "crc32c"}]


def _bytes(values: npt.NDArray[Any]) -> Any:
    """The bytes of an array, as numpy has them: both the checksum and a file take these."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
