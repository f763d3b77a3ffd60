"""The zarr v3 group of an attempt, written by zarr-python so that anyone can open it."""

from pathlib import Path
from typing import Any

import numpy.typing as npt

from hmil_fast.io.store import disk
from hmil_fast.io.store.layout import chunk_rows
from hmil_fast.io.store.schema import StoreSpec


def create_group(attempt: Path, attributes: dict[str, Any]) -> Any:
    """The attempt's group."""
    import zarr

    store = disk.zarr_store(attempt, read_only=False)
    return zarr.create_group(store, zarr_format=3, attributes=attributes)


def _create(group: Any, name: str, **settings: Any) -> Any:
    from zarr.codecs import Crc32cCodec

    return group.create_array(
        name,
        compressors=[Crc32cCodec()],
        fill_value=0,
        # else an all-zero chunk is left out, and "missing" means nothing any more
        config={"write_empty_chunks": True},
        **settings,
    )


def create_features(group: Any, name: str, num_tiles: int, shard: int, spec: StoreSpec) -> Any:
    """The array (N, D), in shards of that many rows; write it whole shards at a time."""
    return _create(
        group,
        name,
        shape=(num_tiles, spec.dim),
        dtype=spec.stored_dtype,
        chunks=(chunk_rows(num_tiles), spec.dim),
        shards=(shard, spec.dim),
        attributes={"dtype_logical": spec.dtype},
    )


def create_small(group: Any, name: str, values: npt.NDArray[Any]) -> None:
    """An array of one chunk, with its values."""
    array = _create(
        group,
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(max(1, len(values)), *values.shape[1:]),
    )
    if len(values):
        array[:] = values
