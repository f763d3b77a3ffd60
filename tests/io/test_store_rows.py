"""Ranges of rows read from a slide's shards, in whole chunks with their checksums."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from hmil_fast.errors import StoreError
from hmil_fast.io.store import FeatureStore, SlideWriter, StoreSpec, create_store, open_store

N, DIM, SHARD = 2500, 16, 1008  # chunks of 504 rows (8·ceil(500/8)), two in a shard
SPEC = StoreSpec(DIM, "float16", {"name": "toy"}, {"mpp": 0.5})
FEATURES = np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float16)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = create_store(tmp_path_factory.mktemp("template"), SPEC)
    with SlideWriter(store.path, SPEC, "s", N, {}, SHARD) as writer:
        writer.append(FEATURES)
        writer.commit(np.zeros((N, 2), np.int32), np.zeros(N, np.uint8))
    return store.path


@pytest.fixture
def store(tmp_path: Path, template: Path) -> FeatureStore:
    return open_store(shutil.copytree(template, tmp_path / "store"))


RANGES = [
    (0, N),
    (0, 0),
    (N, N),
    (0, 1),
    (503, 505),
    (504, 1008),
    (1007, 1009),
    (5, 2016),
    (2016, N),
    (2499, N),
]


def attempt(store: FeatureStore) -> Path:
    (folder,) = (store.path / "slides" / "s").glob("a-*")
    return folder


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_any_range_comes_back(store: FeatureStore, start: int, stop: int) -> None:
    assert len(list((attempt(store) / "features").rglob("c/*/*"))) == 3
    assert store.chunk_rows("s") == 504
    found = store.read_rows("s", start, stop)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, FEATURES[start:stop])


def test_damage_is_found_in_the_rows_that_are_read(store: FeatureStore) -> None:
    shard = attempt(store) / "features/c/1/0"
    data = bytearray(shard.read_bytes())
    data[504 * 2 * DIM + 4 + 100] ^= 1  # in the second chunk of the second shard
    shard.write_bytes(data)
    again = open_store(store.path)
    np.testing.assert_array_equal(again.read_rows("s", 0, 1512), FEATURES[:1512])
    np.testing.assert_array_equal(again.read_rows("s", 2016, N), FEATURES[2016:])
    for start, stop in ((1512, 1513), (1511, 1513), (2015, 2017)):
        with pytest.raises(StoreError, match="the checksum of chunk 1 is wrong"):
            again.read_rows("s", start, stop)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, N + 1)])
def test_rows_that_are_not_there_are_refused(store: FeatureStore, start: int, stop: int) -> None:
    with pytest.raises(StoreError, match=rf"'s' has {N} tiles, not {start} to {stop}"):
        store.read_rows("s", start, stop)
