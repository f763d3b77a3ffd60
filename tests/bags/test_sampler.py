"""The order of bags: within budgets, balanced if asked, known beforehand."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hmil_fast.bags.sampler import epoch_batches, split_batch


@settings(max_examples=200)
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
    for leaves in (None, np.arange(40) % 3):
        orders = {str(epoch_batches(lengths, 7, 100, (0, 0, e), leaves)) for e in range(5)}
        assert len(orders) == 5


@settings(max_examples=100)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 99))
def test_balanced_draws_every_leaf_as_often_as_any_other(leaves: list[int], seed: int) -> None:
    y = np.array(leaves, np.int64)
    lengths = np.ones(len(y), np.int64)
    present = len(set(leaves))
    batches = epoch_batches(lengths, present, len(y), (seed, 0, 3), y)
    assert batches == epoch_batches(lengths, present, len(y), (seed, 0, 3), y)
    for batch in batches:  # rounds of one of each
        assert sorted(y[batch].tolist()) == sorted(set(leaves))
    order = np.concatenate(batches)
    assert len(y) <= len(order) < len(y) + present
    for leaf in set(leaves):  # within a leaf the slides take turns
        counts = np.bincount(order, minlength=len(y))[y == leaf]
        assert counts.max() - counts.min() <= 1


@settings(max_examples=100)
@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 5))
def test_a_batch_is_dealt_out_whole_and_evenly(lengths: list[int], parts: int) -> None:
    n = np.array(lengths, np.int64)
    dealt = split_batch(n, parts)
    assert len(dealt) == parts
    assert sorted(i for part in dealt for i in part) == list(range(len(n)))
    assert all(part == sorted(part) for part in dealt)
    load = [int(n[part].sum()) for part in dealt]
    assert max(load) - min(load) <= max(lengths, default=0)
    if parts == 1:
        assert dealt == [list(range(len(n)))]
