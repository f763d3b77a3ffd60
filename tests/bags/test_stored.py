"""Bags read chunk by chunk from real stores, and the memory that training on one takes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hmil_fast.bags.stored import StoredBag
from hmil_fast.io.store import FeatureStore, StoreSpec, create_store

N, DIM = 2500, 16  # five chunks of 504 rows in the file, the last shorter


def _store(folder: Path, dtype: str = "float16") -> tuple[FeatureStore, torch.Tensor]:
    """A store of one slide, and its good rows."""
    values = torch.randn(N, DIM, generator=torch.Generator().manual_seed(0))
    values = values.to(getattr(torch, dtype))
    status = np.zeros(N, np.uint8)
    status[[3, 700]] = 1
    status[1008:2016] = 1
    values[torch.from_numpy(status > 0)] = 0
    stored = values.view(torch.uint16) if dtype == "bfloat16" else values
    store = create_store(folder, StoreSpec(DIM, dtype, {"name": "toy"}, {"mpp": 0.5}))
    with store.writer("s", N, {}) as writer:
        writer.append(stored.numpy())
        writer.commit(np.zeros((N, 2), np.int32), status)
    return store, values[torch.from_numpy(status == 0)]


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_chunks_hold_the_good_tiles_in_order(tmp_path: Path, dtype: str) -> None:
    store, good = _store(tmp_path, dtype)
    bag = StoredBag(store, "s", rows=600)
    assert [len(bag[k]) for k in range(len(bag))] == [503, 503, 0, 0, 484]
    for rows, count in ((1, 5), (1008, 3), (2015, 2), (10**6, 1)):
        bag = StoredBag(store, "s", rows=rows)
        assert len(bag) == count
        found = torch.cat([bag[k] for k in range(count)])
        assert found.dtype == getattr(torch, dtype)
        assert torch.equal(found, good)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_parts_follow_one_another(tmp_path: Path, ranks: int) -> None:
    store, good = _store(tmp_path)
    parts = [StoredBag(store, "s", rows=504, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert sum(len(part) for part in parts) == 5
    assert torch.equal(torch.cat([part[k] for part in parts for k in range(len(part))]), good)


def test_an_empty_slide_has_no_chunks(tmp_path: Path) -> None:
    store, _ = _store(tmp_path)
    with store.writer("empty", 0, {}) as writer:
        writer.commit(np.zeros((0, 2), np.int32), np.zeros(0, np.uint8))
    assert len(StoredBag(store, "empty")) == 0
    with pytest.raises(ValueError, match="rows is 0, rank 2 of 2; give rows ≥ 1"):
        StoredBag(store, "s", rows=0, rank=2, ranks=2)
