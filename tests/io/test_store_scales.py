"""Stores of several scales, and that stores of one are what they always were."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.stored import StoredBag
from hmil_fast.errors import StoreError, UsageError
from hmil_fast.io.store import (
    FeatureStore,
    StoreSpec,
    at_scale,
    create_store,
    join_scales,
    open_store,
)

BEFORE = Path(__file__).parent.parent / "data" / "store-of-one-scale"
ENCODER = {"name": "e", "weights_sha256": "0" * 64}
TILING = {"tile_px": 256, "mpp": 0.5, "min_tissue": 0.25, "allow_upsample": False}
SIZES = (1500, 700, 3)
SCALES = (0.5, 1.0, 4.0)


def write_as_before(path: Path) -> FeatureStore:
    store = create_store(path, StoreSpec(4, "float16", ENCODER, TILING))
    attrs = {"mpp": {"level0": 0.25}, "tile_px_level0": 512.0}
    with store.writer("a/1", 5, attrs) as writer:
        writer.append(np.arange(20, dtype=np.float16).reshape(5, 4))
        coords, status = np.arange(10).reshape(5, 2) * 512, np.array([0, 0, 0, 1, 0])
        writer.commit(coords, status, {"thumbnail.jpg": b"jpeg"})
    return store


def test_a_store_written_before_there_were_scales_is_read() -> None:
    store = open_store(BEFORE)
    assert store.slide_ids() == ["a/1"]
    features = np.arange(20, dtype=np.float16).reshape(5, 4)
    features[3] = 0
    for seen in (store, at_scale(store), at_scale(store, 0.5)):
        np.testing.assert_array_equal(seen.features("a/1"), features)
        np.testing.assert_array_equal(seen.coords("a/1"), np.arange(10).reshape(5, 2) * 512)
        assert seen.spec == store.spec
    assert [finding.ok for finding in store.verify()] == [True]
    with pytest.raises(UsageError, match=r"no features at 2 µm per px, its scale is 0\.5"):
        at_scale(store, 2.0)


def test_a_store_of_one_scale_is_the_same_to_the_byte(tmp_path: Path) -> None:
    now = write_as_before(tmp_path / "store").record("a/1")
    before = open_store(BEFORE).record("a/1")
    assert (now.config_hash, now.content_digest) == (before.config_hash, before.content_digest)
    assert now.objects == before.objects  # every file's key, size and crc32c
    ours, theirs = (
        json.loads(next(path.glob("slides/*/commit.json")).read_text()).keys()
        for path in (tmp_path / "store", BEFORE)
    )
    assert ours - {"features_digest"} == theirs  # which came later


def rows(seed: int, count: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    coords = rng.integers(0, 9999, (count, 2))
    status = (rng.random(count) < 0.3).astype(np.uint8)
    return rng.standard_normal((count, 8)).astype(np.float16), coords, status


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """A slide of three scales, the one after the other appended in pieces in turn."""
    spec = StoreSpec(8, "float16", ENCODER, TILING | {"coarser": list(SCALES[1:])})
    store = create_store(tmp_path / "several", spec)
    scales = [rows(k, count) for k, count in enumerate(SIZES)]
    facts = [{"tile_px_level0": 256 * m, "level": k} for k, m in enumerate(SCALES)]
    with store.writer(
        "s", SIZES[0], {"level0_size": [9, 9]} | facts[0], list(zip(SIZES, facts, strict=True))[1:]
    ) as writer:
        for piece in range(10):
            for scale, (features, _, _) in enumerate(scales):
                writer.append(np.array_split(features, 10)[piece], scale)
        coords, status = (np.concatenate([scale[k] for scale in scales]) for k in (1, 2))
        parent = np.concatenate([np.arange(1500) % 700, np.arange(700) % 3])
        writer.commit(coords, status, {"thumbnail.jpg": b"jpeg"}, parent)
    return open_store(store.path)


def test_each_scale_reads_as_if_there_were_no_other(store: FeatureStore, tmp_path: Path) -> None:
    for k, mpp in enumerate(SCALES):
        seen = at_scale(store, mpp)
        features, coords, status = rows(k, SIZES[k])
        alone = create_store(tmp_path / f"alone-{k}", seen.spec)
        with alone.writer("s", SIZES[k], {}) as writer:
            writer.append(features)
            single = writer.commit(coords, status)
        features[status > 0] = 0
        np.testing.assert_array_equal(seen.features("s"), features)
        np.testing.assert_array_equal(seen.coords("s"), coords)
        np.testing.assert_array_equal(seen.status("s"), status)
        np.testing.assert_array_equal(seen.read_rows("s", 1, SIZES[k] - 1), features[1:-1])
        np.testing.assert_array_equal(seen.read_packed(["s", "s"])[0][SIZES[k] :], features)
        assert seen.chunk_rows("s") == alone.chunk_rows("s")
        assert seen.file("s", "thumbnail.jpg") == b"jpeg"
        record = seen.record("s")
        assert (record.num_tiles, record.content_digest) == (SIZES[k], single.content_digest)
        assert record.attrs == {"level0_size": [9, 9], "level": k, "tile_px_level0": 256 * mpp}
        cache = FeatureCache(seen, ["s"], tmp_path)
        np.testing.assert_array_equal(cache.bag(0).numpy(), features[status == 0])
        bag = StoredBag(seen, "s", rows=100)
        np.testing.assert_array_equal(np.concatenate([c.numpy() for c in bag]), cache.bag(0))
    np.testing.assert_array_equal(at_scale(store).parent("s"), np.arange(1500) % 700)
    np.testing.assert_array_equal(at_scale(store, 1.0).parent("s"), np.arange(700) % 3)
    with pytest.raises(StoreError, match="parent"):
        at_scale(store, 4.0).parent("s")


def test_the_finest_scale_is_what_one_sees_without_asking(store: FeatureStore) -> None:
    np.testing.assert_array_equal(store.features("s"), at_scale(store, 0.5).features("s"))
    assert at_scale(store).spec == StoreSpec(8, "float16", ENCODER, TILING)
    assert at_scale(store, 1.0).spec.tiling == TILING | {"mpp": 1.0, "around": 0.5}
    group = zarr.open_group(store.path / "slides" / "s" / store.record("s").attempt, mode="r")
    np.testing.assert_array_equal(group["features"][:], store.features("s"))
    np.testing.assert_array_equal(group["mpp-4/features"][:], at_scale(store, 4.0).features("s"))
    info = store.info()
    assert info["tiles"] == sum(SIZES)
    assert info["scales"] == [
        {"mpp": mpp, "tiles": tiles} for mpp, tiles in zip(SCALES, SIZES, strict=True)
    ]
    assert at_scale(store, 1.0).info()["tiles"] == 700
    with pytest.raises(UsageError, match=r"no features at 2 µm per px, its scales are 0\.5 and 1"):
        at_scale(store, 2.0)


@pytest.mark.parametrize("name", ["mpp-1/features/c/0/0", "mpp-4/coords/c/0/0", "mpp-1/parent/c/0"])
def test_damage_to_any_scale_is_found(store: FeatureStore, name: str) -> None:
    assert [finding.ok for finding in store.verify()] == [True]
    path = store.path / "slides" / "s" / store.record("s").attempt / name
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    for seen in (store, at_scale(store, 1.0)):
        finding = next(iter(seen.verify()))
        assert not finding.ok
        assert name in finding.problem


def test_a_slide_without_all_its_scales_is_not_written(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match="rows of 1 scales, the store has 3"):
        store.writer("t", 5, {})
    empty = [(0, {}), (0, {})]
    with store.writer("t", 1, {}, empty) as writer:
        writer.append(np.zeros((1, 8), np.float16))
        with pytest.raises(StoreError, match="parent"):
            writer.commit(np.zeros((1, 2), int), np.zeros(1, int))
    with store.writer("t", 1, {}, empty) as writer:
        writer.append(np.zeros((1, 8), np.float16))
        with pytest.raises(StoreError, match="names rows that do not exist"):
            writer.commit(np.zeros((1, 2), int), np.zeros(1, int), parent=np.zeros(1, int))
    assert store.slide_ids() == ["s"]
    with pytest.raises(StoreError, match="all scales and views at once"):
        at_scale(store, 1.0).writer("t", 0, {})


def test_joined_scales_are_each_tile_with_those_it_lies_in(
    store: FeatureStore, tmp_path: Path
) -> None:
    joined = join_scales(store)
    assert joined.spec.dim == 24
    assert joined.record("s").num_tiles == SIZES[0]
    middle = np.arange(1500) % 700
    at = (np.arange(1500), middle, (np.arange(700) % 3)[middle])
    scales = [at_scale(store, mpp) for mpp in SCALES]
    features = np.concatenate(
        [scale.features("s")[rows] for scale, rows in zip(scales, at, strict=True)], axis=1
    )
    np.testing.assert_array_equal(joined.features("s"), features)
    np.testing.assert_array_equal(joined.read_packed(["s", "s"])[0][1500:], features)
    np.testing.assert_array_equal(joined.read_rows("s", 600, 900), features[600:900])
    assert joined.read_rows("s", 5, 5).shape == (0, 24)
    good = np.logical_and.reduce(
        [scale.status("s")[rows] == 0 for scale, rows in zip(scales, at, strict=True)]
    )
    assert [int((scale.status("s") > 0).sum()) > 0 for scale in scales].count(True) >= 2
    assert good.any()
    for tier in ("host", "stream"):
        cache = FeatureCache(joined, ["s"], tmp_path, tier)
        np.testing.assert_array_equal(cache.bag(0).numpy(), features[good])
    chunks = np.concatenate([chunk.numpy() for chunk in StoredBag(joined, "s", rows=100)])
    np.testing.assert_array_equal(chunks, features[good])
    with pytest.raises(UsageError, match="has one scale"):
        join_scales(open_store(BEFORE))


def test_a_parent_that_does_not_exist_is_damage(store: FeatureStore) -> None:
    attempt = store.path / "slides" / "s" / store.record("s").attempt
    zarr.open_group(attempt, mode="r+")["mpp-1/parent"][7] = -1  # with a checksum that fits
    with pytest.raises(StoreError, match="lies in one that does not exist"):
        join_scales(store).features("s")


def test_scales_in_an_object_store(s3: str) -> None:
    store = create_store(s3, StoreSpec(8, "float16", ENCODER, TILING | {"coarser": [2.0]}))
    (fine, corners, status), (coarse, more, others) = rows(0, 1600), rows(1, 100)
    with store.writer("s", 1600, {}, [(100, {"level": 2})]) as writer:
        writer.append(coarse, 1)
        writer.append(fine)
        coords, bad = np.concatenate([corners, more]), np.concatenate([status, others])
        writer.commit(coords, bad, parent=np.arange(1600) // 16)
    store = open_store(s3)
    coarse[others > 0] = 0
    np.testing.assert_array_equal(at_scale(store, 2.0).features("s"), coarse)
    np.testing.assert_array_equal(join_scales(store).features("s")[:, 8:], coarse.repeat(16, 0))
    assert [finding.ok for finding in store.verify()] == [True]
