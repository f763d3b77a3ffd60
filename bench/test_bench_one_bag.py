"""Measure HMIL on one bag of up to a million instances on a CPU: time and extra memory.

Against the published formulas as they stand, forward once, in the same dtype and the same process,
turn by turn; memory in processes of their own. Features are float16, as a store has them.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.one_bag_memory import CLASSES, DIM, call
from hmil_fast.models.hmil import HMIL

_ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["inference", "training"])
@pytest.mark.parametrize("instances", [10_000, 100_000])
def test_time(benchmark: BenchmarkFixture, instances: int, kind: str, dtype: str) -> None:
    torch.manual_seed(0)
    model, x = HMIL(DIM, CLASSES), torch.randn(instances, DIM).half()
    seconds: dict[str, list[tuple[float, float]]] = {"folded": [], "unfolded": []}

    def timed(form: str) -> Callable[[], None]:
        def run() -> None:
            wall, cpu = time.perf_counter(), time.process_time()
            call(model, x, form, kind, dtype)
            seconds[form].append((time.perf_counter() - wall, time.process_time() - cpu))

        return run

    call(model, x[:4096], "unfolded", kind, dtype)
    benchmark.pedantic(timed("folded"), setup=timed("unfolded"), rounds=5 if instances < 1e5 else 3)
    medians = {form: [median(t) for t in zip(*s, strict=True)] for form, s in seconds.items()}
    wall, cpu = (u / f for u, f in zip(medians["unfolded"], medians["folded"], strict=True))
    threads = torch.get_num_threads()
    benchmark.extra_info.update(threads=threads, dtype=dtype, ratio_wall=wall, ratio_cpu=cpu)
    print(
        f"\n{instances:,} instances, {kind}, {dtype}, {threads} thread(s): "
        f"{medians['folded'][0]:.3f} s; {wall:.1f} times as fast (CPU time {cpu:.1f})"
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["inference", "training"])
def test_memory(benchmark: BenchmarkFixture, kind: str, dtype: str) -> None:
    taken: dict[str, float] = {}

    def measure(instances: int, form: str) -> float:
        which = [str(instances), form, kind, dtype]
        command = [sys.executable, "-m", "bench.one_bag_memory", *which]
        said = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout
        return float(json.loads(said)["extra_bytes"]) / 1e6

    def all_sizes() -> None:
        for instances in (10_000, 100_000, 1_000_000):
            taken[f"{instances:,}"] = measure(instances, "folded")
        taken["100,000 unfolded"] = measure(100_000, "unfolded")

    benchmark.pedantic(all_sizes, rounds=1)
    benchmark.extra_info.update(megabytes=taken)
    print(f"\n{kind}, {dtype}: " + "; ".join(f"{n}: {mb:.0f} MB" for n, mb in taken.items()))
