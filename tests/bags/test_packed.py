"""Packed bags: what comes out of a batch is what lies in the store."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmil_fast.bags.packed import FeatureCache, epoch_batches
from hmil_fast.errors import StoreError
from hmil_fast.io.store import FeatureStore, StoreSpec, create_store

DIM = 12
LENGTHS = {"a": 5, "empty": 0, "b": 1, "c": 700, "d": 33}
CPU = torch.device("cpu")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[FeatureStore, dict[str, np.ndarray]]]:
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


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("in_memory", [None, 0])
def test_a_batch_holds_the_bags_as_stored(
    make: Callable[..., tuple[FeatureStore, dict[str, np.ndarray]]],
    tmp_path: Path,
    dtype: str,
    in_memory: int | None,
) -> None:
    store, stored = make(dtype)
    before = sorted(tmp_path.iterdir())
    ids = list(LENGTHS)
    cache = FeatureCache(store, ids, tmp_path, in_memory)
    assert isinstance(cache._features, np.memmap) is (in_memory == 0)
    assert sorted(tmp_path.iterdir()) == before  # the scratch file has no name
    assert cache.lengths.tolist() == list(LENGTHS.values())
    x, bags = cache.batch([3, 1, 0, 3], CPU)
    assert (x.dtype, bags.dtype) == (torch.float32, torch.int64)
    assert bags.tolist() == [[0, 700], [700, 0], [700, 5], [705, 700]]
    for index, (start, length) in zip([3, 1, 0, 3], bags.tolist(), strict=True):
        np.testing.assert_array_equal(x[start : start + length].numpy(), stored[ids[index]])
    bag = cache.bag(4)
    assert bag.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(bag.float().numpy(), stored["d"])


@pytest.mark.parametrize("in_memory", [None, 0])
def test_tiles_that_cannot_be_decoded_belong_to_no_bag(
    make: Callable[..., tuple[FeatureStore, dict[str, np.ndarray]]],
    tmp_path: Path,
    in_memory: int | None,
) -> None:
    store, stored = make("float16", bad="d")
    cache = FeatureCache(store, list(LENGTHS), tmp_path, in_memory)
    assert cache.lengths.tolist() == [5, 0, 1, 700, 31]
    good = cache.good_tiles(4)
    assert good is not None
    assert good.tolist() == [i for i in range(33) if i not in (0, 16)]
    assert cache.good_tiles(0) is None
    x, bags = cache.batch([4, 2], CPU)
    assert bags.tolist() == [[0, 31], [31, 1]]
    np.testing.assert_array_equal(x.numpy(), np.concatenate([stored["d"], stored["b"]]))


def test_only_empty_bags_and_no_bags(
    make: Callable[..., tuple[FeatureStore, dict[str, np.ndarray]]], tmp_path: Path
) -> None:
    store, _ = make()
    for in_memory in (None, 0):
        cache = FeatureCache(store, ["empty"], tmp_path, in_memory)
        x, bags = cache.batch([0, 0], CPU)
        assert (list(x.shape), bags.tolist()) == ([0, DIM], [[0, 0], [0, 0]])
    assert FeatureCache(store, ["a"], tmp_path).batch([], CPU)[1].shape == (0, 2)
    with pytest.raises(StoreError, match="'nosuch' is not in the store"):
        FeatureCache(store, ["a", "nosuch"], tmp_path)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.just(0), st.integers(0, 60)), max_size=40),
    st.integers(1, 9),
    st.integers(1, 50),
    st.one_of(st.none(), st.integers(0, 99)),
)
def test_batches_keep_both_budgets(
    lengths: list[int], max_bags: int, max_instances: int, seed: int | None
) -> None:
    n = np.array(lengths, np.int64)
    keys = None if seed is None else (seed, 1)
    batches = epoch_batches(n, max_bags, max_instances, keys)
    assert batches == epoch_batches(n, max_bags, max_instances, keys)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(len(n)))
    if seed is None:
        assert order == list(range(len(n)))
    for batch in batches:
        assert 1 <= len(batch) <= max_bags
        assert n[batch].sum() <= max_instances or len(batch) == 1
    for before, after in pairwise(batches):  # none was closed too early
        full = len(before) == max_bags or n[before].sum() + n[after[0]] > max_instances
        assert full


def test_other_seeds_give_other_orders() -> None:
    lengths = np.full(40, 3, np.int64)
    orders = {str(epoch_batches(lengths, 7, 100, (0, 0, epoch))) for epoch in range(5)}
    assert len(orders) == 5
