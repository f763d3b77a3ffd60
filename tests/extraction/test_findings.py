from pathlib import Path

import pytest
import torch

from hmil_fast.extraction.findings import kernel_finding, kernel_findings
from hmil_fast.kernels.dispatch import Choice, choose
from hmil_fast.kernels.proof import Measure
from hmil_fast.kernels.verdict import Verdict

PASSED = Measure("supcon fp32", "lse", 1e-7, 1e-5)
FAILED = Measure("gated_attention_pool bf16", "logits", 0.05, 0.039)


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HMIL_KERNELS", raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_cpu_is_named() -> None:
    (finding,) = kernel_findings()
    assert (finding.state, finding.what) == ("ok", "kernels: reference, the tensors are on a CPU")


def test_a_wish_that_cannot_be_met_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HMIL_KERNELS", "both")
    for finding in kernel_findings():
        assert finding.state == "bad"
        assert "HMIL_KERNELS is 'both'; set it to reference or fused" in finding.what


def test_a_check_is_shown_with_its_numbers_and_its_file() -> None:
    choice = Choice("fused", "its check passed", Verdict((PASSED,), "", "/cache/gpu.json"))
    finding = kernel_finding("kernels on GPU 0", choice)
    assert finding.state == "ok"
    assert finding.what == (
        "kernels on GPU 0: fused, its check passed (supcon fp32, lse: 1.0e-07 (≤ 1.0e-05)); "
        "/cache/gpu.json"
    )
    verdict = Verdict((PASSED, FAILED), "", "/cache/gpu.json")
    finding = kernel_finding("kernels on GPU 0", Choice("reference", "the check failed", verdict))
    assert finding.state == "note"
    assert "reference, the check failed (gated_attention_pool bf16, logits: 5.0e-02" in finding.what
    assert "supcon" not in finding.what
    assert finding.what.endswith("; /cache/gpu.json")
    assert "file is deleted" in finding.fix


@pytest.mark.gpu
def test_each_gpu_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = kernel_findings()
    assert len(found) == torch.cuda.device_count()
    for i, finding in enumerate(found):
        choice = choose(torch.device("cuda", i))
        assert finding.what.startswith(f"kernels on GPU {i}: {choice.name}, {choice.why}")
