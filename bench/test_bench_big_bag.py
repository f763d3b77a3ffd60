"""Measure one training step on a 2 GB bag that stays in the store: extra memory, time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from hmil_fast.io.store import StoreSpec, create_store

ROWS, DIM = 1_000_000, 1024
_ROOT = Path(__file__).resolve().parent.parent


def test_train_step_on_a_big_bag(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Forward, all terms of the loss, backward and optimiser, once, in a process of its own.

    Extra memory is the peak over what the process takes with model and optimiser made. The file
    was just written: its pages are in the cache of the system, as far as that is large enough.
    """
    store = create_store(tmp_path, StoreSpec(DIM, "float16", {"name": "random"}, {"mpp": 0.5}))
    part = np.random.default_rng(0).standard_normal((5000, DIM), np.float32).astype(np.float16)
    with store.writer("big", ROWS, {}) as writer:
        for _ in range(ROWS // len(part)):
            writer.append(part)
        writer.commit(np.zeros((ROWS, 2), np.int32), np.zeros(ROWS, np.uint8))

    taken: dict[str, Any] = {}

    def step() -> None:
        command = [sys.executable, "-m", "bench.big_bag_step", tmp_path, "big", "256"]
        said = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
        taken.update(json.loads(said.stdout))

    benchmark.pedantic(step, rounds=1)
    benchmark.extra_info.update(taken)
    print(
        f"\n{taken['instances']:,} instances of {DIM}, {taken['bag_bytes'] / 1e9:.2f} GB: "
        f"{taken['extra_rss_bytes'] / 1e6:.0f} MB of extra memory, {taken['seconds']:.0f} s "
        f"({taken['forward_seconds']:.0f} s of them forward)"
    )
