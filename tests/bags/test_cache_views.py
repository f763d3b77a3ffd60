"""The feature cache with augmented views: bag v · S + i is slide i in view v."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.config import CACHES
from hmil_fast.errors import UsageError
from hmil_fast.io.store import FeatureStore, StoreSpec, create_store

LENGTHS = {"a": 5, "empty": 0, "c": 700, "d": 33}
CPU = torch.device("cpu")


@pytest.fixture
def stored(tmp_path: Path) -> tuple[FeatureStore, list[np.ndarray]]:
    """A store of two views, and the features of its bags; slide d has a bad tile."""
    spec = StoreSpec(6, "float32", {"name": "toy"}, {"views": {"count": 2}})
    store = create_store(tmp_path / "store", spec)
    rng = np.random.default_rng(0)
    bags: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}
    for slide_id, n in LENGTHS.items():
        status = np.zeros(n, np.uint8)
        if slide_id == "d":
            status[7] = 1
        with store.writer(slide_id, n, {}) as writer:
            for view, held in bags.items():
                x = rng.normal(size=(n, 6)).astype(np.float32)
                writer.append(x, view=view)
                held.append(x[status == 0])
            writer.commit(np.zeros((n, 2), np.int64), status)
    return store, [x for held in bags.values() for x in held]


@pytest.mark.parametrize("tier", CACHES)
def test_every_view_of_every_slide_is_a_bag(
    stored: tuple[FeatureStore, list[np.ndarray]], tmp_path: Path, tier: str
) -> None:
    store, bags = stored
    cache = FeatureCache(store, list(LENGTHS), tmp_path, tier, views=2)
    assert cache.lengths.tolist() == [len(x) for x in bags]
    chosen = [[2, 6, 11], [0, 9], list(range(12)), [10], [4, 8], [6, 2, 3]]
    for indices, (x, where) in zip(chosen, cache.batches(chosen, CPU), strict=True):
        expected = np.concatenate([bags[i] for i in indices])
        assert isinstance(x, torch.Tensor)
        np.testing.assert_array_equal(x.numpy(), expected)
        assert where[:, 1].tolist() == [len(bags[i]) for i in indices]
    for index in (2, 6, 10):  # one large bag in chunks
        [(x, _)] = cache.batches([[index]], CPU, whole=100)
        chunks = [x[k] for k in range(len(x))]
        np.testing.assert_array_equal(torch.cat(chunks).numpy(), bags[index])
    good = cache.good_tiles(11)
    assert good is not None
    assert 7 not in good
    assert "in 3 views" in cache.describe()
    assert "737 instances of 4 slides" in cache.describe()


def test_the_first_view_of_two_may_be_taken_alone(
    stored: tuple[FeatureStore, list[np.ndarray]], tmp_path: Path
) -> None:
    store, bags = stored
    assert len(FeatureCache(store, list(LENGTHS), tmp_path).lengths) == 4
    cache = FeatureCache(store, list(LENGTHS), tmp_path, views=1)
    np.testing.assert_array_equal(cache.bag(6).numpy(), bags[6])
    with pytest.raises(UsageError, match="which holds 2"):
        FeatureCache(store, list(LENGTHS), tmp_path, views=3)
