"""bf16 products with fp32 weights: as good as fp32, within what another seed changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hmil_fast.device import amp, computes_in_bf16, is_bf16

CPU = torch.device("cpu")


def curve(run: Any) -> np.ndarray:
    records = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    return np.array([r["loss"] for r in records if r["event"] == "epoch" and r["fold"] == 0])


def leaf_auc(run: Any) -> float:
    metrics = json.loads((run.path / "metrics.json").read_text())
    return float(metrics["pooled"]["levels"]["1"]["auc"]["value"])


@pytest.mark.slow
def test_bf16_trains_as_fp32_does(
    tmp_path: Path, train_small: Callable[..., Any], monkeypatch: Any
) -> None:
    from hmil_fast.kernels.gated_attention_pool import streaming

    monkeypatch.setattr(streaming, "computes_in_bf16", lambda device: True)  # on any CPU
    common = {"folds": 2, "epochs": 8, "dropout": 0.0}
    exact = train_small(tmp_path / "fp32", precision="fp32", **common)
    rough = train_small(tmp_path / "bf16", precision="bf16", **common)
    other = train_small(tmp_path / "seed", precision="fp32", **{**common, "seed": 1})
    apart = np.abs(curve(rough) - curve(exact))
    assert 0 < apart.max() < 0.02 * curve(exact).max()
    assert apart.mean() < 0.2 * np.abs(curve(other) - curve(exact)).mean()
    assert abs(leaf_auc(rough) - leaf_auc(exact)) < 0.02
    kept = load_file(rough.path / "fold-0" / "best.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}  # master weights
    first = json.loads((rough.path / "log.jsonl").read_text().splitlines()[0])
    assert first["precision"] == "bf16"


def test_auto_is_what_the_hardware_has() -> None:
    for precision, wanted in (("auto", computes_in_bf16(CPU)), ("fp32", False), ("bf16", True)):
        assert is_bf16(CPU, precision) is wanted
        with amp(CPU, precision):
            assert torch.is_autocast_enabled("cpu") is wanted
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if flags:
        assert computes_in_bf16(CPU) == ("avx512_bf16" in flags or "amx_bf16" in flags)
