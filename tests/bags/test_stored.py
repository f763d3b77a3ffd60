"""Bags read chunk by chunk from real stores, and the memory that training on one takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hmil_fast.bags.stored import StoredBag
from hmil_fast.io.store import FeatureStore, StoreSpec, create_store

ROOT = Path(__file__).resolve().parent.parent.parent
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


@pytest.mark.slow
def test_a_step_takes_less_memory_than_its_bag(tmp_path: Path) -> None:
    rows, dim = 75_000, 1024
    store = create_store(tmp_path, StoreSpec(dim, "float16", {"name": "toy"}, {"mpp": 0.5}))
    part = np.random.default_rng(0).normal(size=(5000, dim)).astype(np.float16)
    with store.writer("big", rows, {}) as writer:
        for _ in range(rows // len(part)):
            writer.append(part)
        writer.commit(np.zeros((rows, 2), np.int32), np.zeros(rows, np.uint8))
    # little arithmetic beside the reading: the first layer has 32 outputs
    said = subprocess.run(
        [sys.executable, "-m", "bench.big_bag_step", tmp_path, "big", "32"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    taken = json.loads(said.stdout)
    assert taken["bag_bytes"] == 2 * rows * dim
    assert taken["extra_rss_bytes"] < 0.85 * taken["bag_bytes"]
    assert {"fine", "coarse", "hba", "ham", "supcon"} <= taken["terms"].keys()
    assert all(norm > 0 for name, norm in taken["gradient"].items() if "weight" in name)
