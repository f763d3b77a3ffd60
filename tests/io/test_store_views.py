"""Augmented views in a store: written with the slide, read alone, verified, and in its hash."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from hmil_fast.errors import StoreError, UsageError
from hmil_fast.io.store import (
    FeatureStore,
    StoreSpec,
    at_scale,
    at_view,
    create_store,
    join_scales,
    open_store,
)

ENCODER = {"name": "e", "weights_sha256": "0" * 64}
TILING = {"tile_px": 256, "mpp": 0.5}
VIEWS = {"views": {"count": 2, "seed": 7}}
N = 1300


def rows(n: int, view: int, scale: int = 0) -> NDArray[Any]:
    return np.random.default_rng([view, scale]).normal(size=(n, 8)).astype(np.float16)


def write(store: FeatureStore, slide_id: str, n: int = N, bad: int | None = None) -> None:
    status = np.zeros(n, np.uint8)
    if bad is not None:
        status[bad] = 1
    with store.writer(slide_id, n, {}) as writer:
        for start in range(0, n, 100):
            for view in range(3):
                writer.append(rows(n, view)[start : start + 100], view=view)
        writer.commit(np.zeros((n, 2), np.int64), status)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    store = create_store(tmp_path / "s", StoreSpec(8, "float16", ENCODER, TILING | VIEWS))
    write(store, "a", bad=5)
    write(store, "empty", 0)
    return open_store(tmp_path / "s")


def test_each_view_is_read_alone(store: FeatureStore) -> None:
    for view in range(3):
        seen, expected = at_view(store, view), rows(N, view)
        expected[5] = 0  # could not be decoded, in no view
        np.testing.assert_array_equal(seen.features("a"), expected)
        np.testing.assert_array_equal(seen.read_rows("a", 600, 700), expected[600:700])
        np.testing.assert_array_equal(seen.read_packed(["empty", "a"])[0], expected)
        np.testing.assert_array_equal(seen.status("a"), store.status("a"))
    # and by anyone who knows zarr
    [attempt] = store.path.glob("slides/a/a-*.zarr")
    group = zarr.open_group(attempt, mode="r")
    np.testing.assert_array_equal(group["views/2"][:], at_view(store, 2).features("a"))
    for view in (-1, 3):
        with pytest.raises(UsageError, match="which holds 2"):
            at_view(store, view)
    with pytest.raises(StoreError, match="part of the store"):
        at_view(store, 1).writer("b", 1, {})


def test_views_are_in_the_hash_and_the_info(store: FeatureStore, tmp_path: Path) -> None:
    plain = StoreSpec(8, "float16", ENCODER, TILING)
    other = StoreSpec(8, "float16", ENCODER, TILING | {"views": {"count": 2, "seed": 8}})
    assert len({s.config_hash for s in (plain, other, store.spec)}) == 3
    with pytest.raises(StoreError, match=r"views\.seed: 7 in the store, 8 asked for"):
        create_store(tmp_path / "s", other)
    with pytest.raises(StoreError, match=r"views: --views 2 in the store, none asked for"):
        create_store(tmp_path / "s", plain)
    assert store.info()["views"] == 2
    assert store.info()["tiles"] == N
    for bad in ({"count": 65}, {"count": -1}, {"count": "2"}, {}, 2):
        with pytest.raises(StoreError):
            StoreSpec(8, "float16", ENCODER, TILING | {"views": bad})


def test_verify_reads_all_views(store: FeatureStore) -> None:
    assert [finding.ok for finding in store.verify()] == [True, True]
    digest = store.record("a").content_digest
    [chunk] = store.path.glob("slides/a/a-*.zarr/views/2/c/*/0")
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    [finding, _] = store.verify()
    assert not finding.ok
    assert "views/2" in finding.problem
    with pytest.raises(StoreError, match="checksum"):
        at_view(store, 2).features("a")
    assert len(at_view(store, 1).features("a")) == N
    store.drop("a")
    write(store, "a", bad=5)
    assert store.record("a").content_digest == digest


def test_nothing_is_committed_without_all_views(store: FeatureStore) -> None:
    with store.writer("b", 3, {}) as writer:
        for view in (0, 1):
            writer.append(rows(3, view), view=view)
        with pytest.raises(StoreError, match="0 rows of view 2 of 3"):
            writer.commit(np.zeros((3, 2), np.int64), np.zeros(3, np.uint8))
    with store.writer("b", 3, {}) as writer:
        for view in (0, 1, 2):
            writer.append(np.full((3, 8), np.inf if view == 2 else 1, np.float16), view=view)
        with pytest.raises(StoreError, match="not finite"):
            writer.commit(np.zeros((3, 2), np.int64), np.zeros(3, np.uint8))
    assert store.slide_ids() == ["a", "empty"]
    assert not list(store.path.glob("slides/b/*"))


def test_views_of_several_scales(tmp_path: Path) -> None:
    spec = StoreSpec(8, "float16", ENCODER, TILING | VIEWS | {"coarser": [2.0]})
    store = create_store(tmp_path / "s", spec)
    sizes = (40, 3)
    with store.writer("a", sizes[0], {}, coarser=[(sizes[1], {})]) as writer:
        for scale, n in enumerate(sizes):
            for view in range(3):
                writer.append(rows(n, view, scale), scale=scale, view=view)
        n = sum(sizes)
        parent = np.zeros(sizes[0], np.int64)
        writer.commit(np.zeros((n, 2), np.int64), np.zeros(n, np.uint8), parent=parent)
    for scale, (mpp, n) in enumerate(zip((0.5, 2.0), sizes, strict=True)):
        for view in range(3):
            found = at_view(at_scale(store, mpp), view).features("a")
            np.testing.assert_array_equal(found, rows(n, view, scale))
    joined = join_scales(store)
    for view in (2, 0, 1):
        joined = at_view(joined, view)
        expected = np.concatenate([rows(40, view), rows(3, view, 1)[np.zeros(40, int)]], axis=1)
        np.testing.assert_array_equal(joined.features("a"), expected)
        np.testing.assert_array_equal(joined.read_rows("a", 5, 9), expected[5:9])
    assert [finding.ok for finding in store.verify()] == [True]
