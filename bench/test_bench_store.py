"""Measure reading a batch of bags from a store, against np.load and zarr-python.

Compare ratios taken on one machine in one run. `cpu_s_per_GB` is process time, all threads;
`times_raw` is the median over rounds of the time divided by that of a plain read of the same rows,
from .npy files into one buffer, made just before it.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hmil_fast.io.store import FeatureStore, StoreSpec, create_store

DIM = 1024
SLIDES = 16
ROUNDS = 7


class Cohort:
    """The same random features as a store, as .npy files, and where to put a packed batch."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        lengths = np.exp(rng.normal(np.log(3500), 0.8, SLIDES)).astype(int).clip(1, 20_000)
        spec = StoreSpec(DIM, "float16", {"name": "random"}, {"mpp": 0.5})
        self.store: FeatureStore = create_store(folder / "store", spec)
        self.folder = folder
        self.names = [f"s{i}" for i in range(SLIDES)]
        for name, n in zip(self.names, lengths.tolist(), strict=True):
            features = rng.standard_normal((n, DIM), np.float32).astype(np.float16)
            np.save(folder / f"{name}.npy", features)
            with self.store.writer(name, n, {}) as writer:
                writer.append(features)
                writer.commit(np.zeros((n, 2), np.int32), np.zeros(n, np.uint8))
        self.out = np.zeros((int(lengths.sum()), DIM), np.float16)

    def raw(self) -> np.ndarray:
        """The floor: .npy payloads read into one buffer that exists already."""
        start = 0
        for name in self.names:
            with (self.folder / f"{name}.npy").open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size - 128
                rows = size // (2 * DIM)
                os.preadv(file.fileno(), [self.out[start : start + rows].data.cast("B")], 128)
                start += rows
        return self.out

    def npy(self) -> np.ndarray:
        """What most training scripts do."""
        return np.concatenate([np.load(self.folder / f"{name}.npy") for name in self.names])

    def zarr(self) -> np.ndarray:
        """The same store through zarr-python, with its defaults."""
        import zarr

        folders = [
            self.store.path / "slides" / name / self.store.record(name).attempt
            for name in self.names
        ]
        return np.concatenate(
            [np.asarray(zarr.open_array(folder / "features", mode="r")[:]) for folder in folders]
        )

    def ours(self, threads: int = 1) -> np.ndarray:
        """The direct reader into memory that exists already; checksums verified."""
        return self.store.read_packed(self.names, self.out, threads)[0]

    def ours_new(self) -> np.ndarray:
        """The direct reader, allocating as it goes."""
        return self.store.read_packed(self.names, threads=1)[0]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort(tmp_path_factory.mktemp("cohort"))


WAYS: dict[str, Callable[[Cohort], Any]] = {
    "plain read into a buffer": Cohort.raw,
    "read_packed into a buffer": Cohort.ours,
    "read_packed into a buffer, 2 threads": lambda cohort: cohort.ours(2),
    "read_packed, new array": Cohort.ours_new,
    "np.load + concatenate": Cohort.npy,
    "zarr-python + concatenate": Cohort.zarr,
}


@pytest.mark.parametrize("way", WAYS)
def test_read_packed_batch(benchmark: BenchmarkFixture, cohort: Cohort, way: str) -> None:
    read = WAYS[way]
    np.testing.assert_array_equal(read(cohort), cohort.npy())
    gigabytes = cohort.out.nbytes / 1e9
    cpu, ratios = [], []

    def paired() -> None:
        begun = time.perf_counter()
        cohort.raw()
        between, cpu_before = time.perf_counter(), time.process_time()
        read(cohort)
        cpu.append((time.process_time() - cpu_before) / gigabytes)
        ratios.append((time.perf_counter() - between) / (between - begun))

    for _ in range(ROUNDS):
        paired()
    benchmark.group = f"packed batch of {SLIDES} bags, {gigabytes:.2f} GB"
    benchmark.extra_info.update(
        cpu_s_per_GB=round(float(np.median(cpu)), 3),
        times_raw=round(float(np.median(ratios)), 2),
        slides=SLIDES,
        gigabytes=round(gigabytes, 3),
    )
    benchmark.pedantic(read, args=(cohort,), rounds=ROUNDS, warmup_rounds=1)


def test_write_and_commit(benchmark: BenchmarkFixture, cohort: Cohort) -> None:
    """One slide of 4,096 tiles, fsync and reading back included."""
    features = cohort.out[:4096]

    def write() -> None:
        with cohort.store.writer("written", len(features), {}) as writer:
            writer.append(features)
            writer.commit(np.zeros((4096, 2), np.int32), np.zeros(4096, np.uint8))
        cohort.store.drop("written")

    benchmark.extra_info.update(megabytes=round(features.nbytes / 1e6, 1))
    benchmark.pedantic(write, rounds=5, warmup_rounds=1)
