"""What we write is what zarr-python would have written, byte for byte."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from hmil_fast.io.store import StoreSpec
from hmil_fast.io.store.arrays import Group
from hmil_fast.io.store.layout import chunk_rows, shard_rows


def by_zarr(folder: Path, arrays: dict[str, tuple[np.ndarray, int | None, dict[str, str]]]) -> None:
    """Write arrays with zarr-python: values, rows of a shard or None, attributes."""
    group = zarr.create_group(LocalStore(folder), zarr_format=3, attributes={"x": 1})
    for name, (values, shard, attributes) in arrays.items():
        n, *width = values.shape
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(max(1, n) if shard is None else chunk_rows(n), *width),
            shards=None if shard is None else (shard, *width),
            compressors=[Crc32cCodec()],
            fill_value=0,
            attributes=attributes,
            config={"write_empty_chunks": True},
        )
        if n:
            array[:] = values


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("tiles", "dim", "dtype", "most"),
    [
        (700, 8, "float16", 65_536),
        (1, 3, "float32", 65_536),
        (1300, 5, "bfloat16", 512),
        (2500, 4, "float16", 1024),  # a shard whose last chunk lies past the end
        (0, 4, "float16", 8),
    ],
)
def test_bytes_are_those_of_zarr(
    tmp_path: Path, tiles: int, dim: int, dtype: str, most: int
) -> None:
    spec = StoreSpec(dim, dtype, {}, {})
    shard = shard_rows(tiles, spec.row_bytes, most)
    rng = np.random.default_rng(0)
    features = rng.integers(0, 100, (tiles, dim)).astype(spec.stored_dtype)
    coords = rng.integers(0, 2**31 - 1, (tiles, 2), dtype=np.int32)
    picture = rng.integers(0, 256, 77, dtype=np.uint8)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    by_zarr(
        theirs,
        {
            "features": (features, shard, {"dtype_logical": dtype}),
            "coords": (coords, None, {}),
            "files/a.jpg": (picture, None, {}),
        },
    )
    ours.mkdir()
    group = Group(ours, {"x": 1})
    array = group.features("features", tiles, shard, spec)
    for start in range(0, tiles, shard):
        array.write(start, features[start : start + shard])
        stop = min(start + shard, tiles)
        assert np.array_equal(array.read(start, stop), features[start:stop])
    group.small("coords", coords)
    group.small("files/a.jpg", picture)
    assert contents(ours) == contents(theirs)
    opened = zarr.open_group(ours, mode="r")
    assert np.array_equal(opened["features"][:], features)
