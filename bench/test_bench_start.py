"""Measure the time of a process that imports hmil_fast or prints the help.

Each is a process of its own, in turns with `python -c pass`, whose time is printed beside it.
PYTHONPATH chooses another checkout: `PYTHONPATH=OTHER/build/tree pytest bench/test_bench_start.py`.
"""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

COMMANDS = {
    "import": ["-c", "import hmil_fast"],
    "--help": ["-m", "hmil_fast.cli", "--help"],
    "train --help": ["-m", "hmil_fast.cli", "train", "--help"],
    "import and open_store": ["-c", "from hmil_fast.io.store import open_store"],
}


def seconds(arguments: list[str], cwd: Path) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=cwd, check=True, capture_output=True)
    return time.perf_counter() - start


@pytest.mark.parametrize("name", COMMANDS)
def test_start(benchmark: BenchmarkFixture, name: str, tmp_path: Path) -> None:
    empty: list[float] = []
    mine: list[float] = []

    def both() -> None:
        empty.append(seconds(["-c", "pass"], tmp_path))
        mine.append(seconds(COMMANDS[name], tmp_path))

    benchmark.pedantic(both, rounds=15, warmup_rounds=1)
    benchmark.extra_info.update(seconds=median(mine), empty=median(empty))
    print(f"\n{name}: {median(mine):.3f} s; python alone {median(empty):.3f} s")
