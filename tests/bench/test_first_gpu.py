"""The script of the first minutes on a GPU, tried on a CPU with tiny sizes: a real process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.first_gpu import report

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_dry_run_goes_through_all_steps(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    before = sorted((ROOT / "bench" / "results").iterdir())
    command = [sys.executable, "-m", "bench.first_gpu", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted((ROOT / "bench" / "results").iterdir()) == before
    (place,) = tmp_path.iterdir()
    whole = json.loads((place / "first-gpu.json").read_text())
    ended = {r["name"]: r for r in whole["results"] if r["step"] == "ended"}
    assert {name: r["tail"] for name, r in ended.items() if r["code"] != 0} == {}
    assert len(ended) == 14
    by_step = {r["step"]: r for r in whole["results"]}
    assert by_step["pixels"]["mean"] == 0, "on a CPU both are one decoder"
    assert by_step["order"] == by_step["order"] | {"needs": "a GPU"}
    assert all(r["code"] == 0 for r in whole["results"] if r["step"] in ("train",))
    assert by_step["transform"]["batches_overwritten"] == []
    constants = whole["constants"]
    assert constants["decode_choice.CPU_TILES_PER_S"]["jpeg"] > 0
    assert constants["decode_choice: seconds of extract, cpu and gpu"]["jpeg"][0] > 0
    assert constants["dispatch.choose: proofs passed"] is None
    table = (place / "first-gpu.md").read_text()
    assert "| rate | codec jpeg2000" in table
    assert "not measured" in table


def test_constants_by_made_results() -> None:
    found = [
        {"step": "rate", "codec": "jpeg", "on": "cpu", "threads": 1, "tiles_per_s": 5000.4},
        {"step": "rate", "codec": "jpeg", "on": "cpu", "threads": 8, "tiles_per_s": 30000.0},
        {"step": "rate", "codec": "jpeg", "on": "device", "batch": 64, "tiles_per_s": 20000.0},
        {"step": "rate", "codec": "jpeg", "on": "device", "batch": 256, "tiles_per_s": 40000.0},
        {"step": "order", "codec": "jpeg", "written_before_its_turn": 10, "of": 10},
        {"step": "step", "kernels": "fused", "rows": 500, "wall_ms": 2.0},
        {"step": "step", "kernels": "reference", "rows": 500, "wall_ms": 9.0},
        {"step": "ended", "name": "numerics-pool", "code": 0},
        {"step": "ended", "name": "numerics-core", "code": "no end in time"},
        {"step": "extract", "codec": "jpeg", "decode": "gpu", "code": 1, "seconds": 3.0},
        {"step": "transform", "backend": "dali", "tiles_per_s": 3.0},
        {"step": "transform", "backend": "torch", "tiles_per_s": 2.0},
    ]
    made = report.constants(found)
    assert made["decode_choice.CPU_TILES_PER_S"] == {"jpeg": 5000, "jpeg2000": None}
    assert made["decode_choice: tiles/s of the device"]["jpeg"] == 40000
    assert made["decode_choice: seconds of extract, cpu and gpu"]["jpeg"] == [None, None]
    assert made["device_band: the host must wait"] == [True]
    assert made["dispatch.choose: proofs passed"] is False
    assert made["dispatch.choose: step, reference ÷ fused"] == {500: 4.5}
    assert made["transform.build_transform: quicker where nothing is resized"] == "dali"


def test_without_a_gpu_it_says_how_to_try_it() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "bench.first_gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there is no CUDA device; --dry tries the script on a CPU" in done.stderr
