"""`hmil-fast bench NAME` finds the benchmark that NAME names, from any folder."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from hmil_fast.cli.main import main

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"
NAMES = [path.stem.removeprefix("test_bench_") for path in BENCH.glob("test_bench_*.py")]


@pytest.mark.parametrize("name", [*NAMES, "all", "kernels"])
def test_every_benchmark_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called: list[tuple[list[str], Path]] = []

    def call(command: list[str], cwd: Path) -> int:
        called.append((command, cwd))
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", name]) == 0
    assert {cwd for _, cwd in called} == {BENCH.parent}
    words: list[Any] = [word for command, _ in called for word in command]
    assert ("bench.kernels" in words) == (name in ("all", "kernels"))
    if name != "kernels":
        assert str(BENCH if name == "all" else BENCH / f"test_bench_{name}.py") in words
