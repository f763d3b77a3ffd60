"""The feature cache: what comes out of a batch is what lies in the store, in every tier."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hmil_fast.bags import cache as module
from hmil_fast.bags import cache_placement
from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.cache_placement import choose_tier
from hmil_fast.config import CACHES
from hmil_fast.errors import StoreError, UsageError
from hmil_fast.io.store import FeatureStore, StoreSpec, create_store

DIM = 12
LENGTHS = {"a": 5, "empty": 0, "b": 1, "c": 700, "d": 33}
CPU = torch.device("cpu")
Make = Callable[..., tuple[FeatureStore, dict[str, np.ndarray]]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(
        dtype: str = "float16", bad: str | None = None
    ) -> tuple[FeatureStore, dict[str, np.ndarray]]:
        spec = StoreSpec(DIM, dtype, {"name": "toy"}, {"tile_px": 64})
        store = create_store(tmp_path / f"store-{dtype}-{bad}", spec)
        rng = np.random.default_rng(0)
        stored = {}
        for slide_id, n in LENGTHS.items():
            x = rng.normal(size=(n, DIM)).astype(np.float32)
            # cut to bfloat16, whose bits the store keeps in uint16
            bits = (x.view(np.uint32) >> 16).astype(np.uint16)
            status = np.zeros(n, np.uint8)
            if slide_id == bad:
                status[[0, n // 2]] = (1, 4)
            with store.writer(slide_id, n, {}) as writer:
                writer.append(bits if dtype == "bfloat16" else x.astype(dtype))
                writer.commit(np.zeros((n, 2), np.int64), status, {})
            wide = (bits.astype(np.uint32) << 16).view(np.float32)
            values = wide if dtype == "bfloat16" else x.astype(dtype).astype(np.float32)
            stored[slide_id] = values[status == 0]
        return store, stored

    return make


def values(x: torch.Tensor, bags: torch.Tensor) -> list[np.ndarray]:
    return [x[start : start + n].float().numpy().copy() for start, n in bags.tolist()]


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("tier", CACHES)
def test_a_batch_holds_the_bags_as_stored(
    make: Make, tmp_path: Path, dtype: str, tier: str
) -> None:
    store, stored = make(dtype)
    before = sorted(tmp_path.iterdir())
    ids = list(LENGTHS)
    cache = FeatureCache(store, ids, tmp_path, tier)
    assert cache.tier.name == ("host" if tier == "auto" else tier)
    assert sorted(tmp_path.iterdir()) == before  # the scratch file has no name
    assert cache.lengths.tolist() == list(LENGTHS.values())
    assert cache.bytes == 739 * DIM * (4 if dtype == "float32" else 2)
    chosen = [[3, 1, 0, 3], [2, 3], [], [1], [4, 0], [0], [4, 3, 2]]
    single = [cache.batch(indices, CPU) for indices in chosen]
    wanted = [[stored[ids[i]] for i in indices] for indices in chosen]
    assert single[0][1].tolist() == [[0, 700], [700, 0], [700, 5], [705, 700]]
    found = [values(x, bags) for x, bags in single]
    turned = [values(x, bags) for x, bags in cache.batches(chosen, CPU)]  # before the next comes
    for (x, bags), ours, in_turn, theirs in zip(single, found, turned, wanted, strict=True):
        assert (x.dtype, bags.dtype, x.shape[1]) == (getattr(torch, dtype), torch.int64, DIM)
        assert bags.shape == (len(theirs), 2)
        for a, b, c in zip(ours, in_turn, theirs, strict=True):
            np.testing.assert_array_equal(a, c)
            np.testing.assert_array_equal(b, c)
    bag = cache.bag(4)
    assert bag.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(bag.float().numpy(), stored["d"])


@pytest.mark.parametrize("tier", ["device", "host", "map"])
def test_neighbours_in_the_cache_are_not_copied(make: Make, tmp_path: Path, tier: str) -> None:
    store, _ = make()
    cache = FeatureCache(store, list(LENGTHS), tmp_path, tier)
    whole, _ = cache.batch(range(5), CPU)
    inside = range(whole.data_ptr(), whole.data_ptr() + cache.bytes)
    for indices in ([0, 1, 2], [2, 3], [1, 3, 4], [4]):
        x, _ = cache.batch(indices, CPU)
        assert x.data_ptr() in inside
        for x, _ in cache.batches([indices], CPU):
            assert x.data_ptr() in inside
    for indices in ([0, 3], [3, 2], [0, 0]):
        x, _ = cache.batch(indices, CPU)
        assert x.data_ptr() not in inside


def test_batches_are_written_into_the_same_memory(make: Make, tmp_path: Path) -> None:
    store, _ = make()
    scattered = [[3, 0], [3, 2], [4, 3], [3, 0]]
    cache = FeatureCache(store, list(LENGTHS), tmp_path, "host")
    places = [x.data_ptr() for x, _ in cache.batches(scattered, CPU)]
    assert places[0] == places[1]
    assert places[2] == places[3]  # the third needs more


@pytest.mark.parametrize("tier", CACHES)
def test_tiles_that_cannot_be_decoded_belong_to_no_bag(
    make: Make, tmp_path: Path, tier: str
) -> None:
    for dtype in ("float16", "bfloat16"):
        store, stored = make(dtype, bad="d")
        cache = FeatureCache(store, list(LENGTHS), tmp_path, tier)
        assert cache.lengths.tolist() == [5, 0, 1, 700, 31]
        assert cache.bytes == 737 * DIM * 2
        good = cache.good_tiles(4)
        assert good is not None
        assert good.tolist() == [i for i in range(33) if i not in (0, 16)]
        assert cache.good_tiles(0) is None
        for x, bags in (cache.batch([4, 2], CPU), *cache.batches([[4, 2]], CPU)):
            assert bags.tolist() == [[0, 31], [31, 1]]
            np.testing.assert_array_equal(
                x.float().numpy(), np.concatenate([stored["d"], stored["b"]])
            )


@pytest.mark.parametrize("tier", CACHES)
def test_only_empty_bags_and_no_bags(make: Make, tmp_path: Path, tier: str) -> None:
    store, _ = make()
    cache = FeatureCache(store, ["empty"], tmp_path, tier)
    x, bags = cache.batch([0, 0], CPU)
    assert (list(x.shape), bags.tolist()) == ([0, DIM], [[0, 0], [0, 0]])
    assert FeatureCache(store, ["a"], tmp_path, tier).batch([], CPU)[1].shape == (0, 2)
    assert list(cache.batches([], CPU)) == []
    with pytest.raises(StoreError, match="'nosuch' is not in the store"):
        FeatureCache(store, ["a", "nosuch"], tmp_path, tier)


def test_a_damaged_slide_is_named_when_it_is_streamed(make: Make, tmp_path: Path) -> None:
    store, _ = make()
    cache = FeatureCache(store, list(LENGTHS), tmp_path, "stream")
    shard = next((store.path / "slides").glob("c/*.zarr/features/c/0/0"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    found = cache.batches([[0], [3], [4]], CPU)
    next(found)
    with pytest.raises(StoreError, match="'c' is damaged"):
        next(found)


def test_the_tier_follows_from_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"cuda": 80, "cpu": 200}
    monkeypatch.setattr(cache_placement, "free_memory", lambda device: free[device.type] * 10**9)
    disk = type("Usage", (), {"free": 1000 * 10**9})
    monkeypatch.setattr(cache_placement, "disk_usage", lambda path: disk)
    gpu = torch.device("cuda")
    for size, wanted in ((40, "device"), (41, "host"), (101, "map"), (501, "stream")):
        assert choose_tier("auto", size * 10**9, gpu, tmp_path).name == wanted
        on_cpu = choose_tier("auto", size * 10**9, CPU, tmp_path).name
        assert on_cpu == ("host" if wanted == "device" else wanted)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # each process keeps its own
    assert choose_tier("auto", 41 * 10**9, gpu, tmp_path).name == "map"
    assert choose_tier("map", 10**15, gpu, tmp_path).name == "map"
    why = choose_tier("auto", 10**15, CPU, tmp_path).why
    assert why == "nothing holds them: 50.0 GB, 250.0 GB were free"
    with pytest.raises(UsageError, match="cache is 'ram'"):
        choose_tier("ram", 0, CPU, tmp_path)


def test_a_scratch_file_that_does_not_fit_is_told(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = make()

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(UsageError, match="No space left") as error:
        FeatureCache(store, ["a"], tmp_path, "map")
    assert "cache=stream" in error.value.fix


def test_it_says_where_the_features_lie(make: Make, tmp_path: Path) -> None:
    store, _ = make()
    said = FeatureCache(store, list(LENGTHS), tmp_path, "map").describe()
    assert said == "739 instances of 5 slides, 0.0 GB, in a mapped scratch file (asked for)"
    assert "in main memory (" in FeatureCache(store, list(LENGTHS), tmp_path).describe()


@pytest.mark.gpu
def test_main_memory_is_pinned_at_its_own_size(store: FeatureStore, tmp_path: Path) -> None:
    gpu = torch.device("cuda", 0)
    cache = FeatureCache(store, list(LENGTHS), tmp_path, "host", gpu)
    assert "pinned" in cache.describe()
    x, bags = cache.batch([0, 2], gpu)
    assert torch.equal(x[: bags[0, 1]].cpu(), cache.bag(0))
