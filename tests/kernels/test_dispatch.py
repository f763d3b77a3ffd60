import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hmil_fast.kernels.dispatch import choose, judged
from hmil_fast.kernels.gated_attention_pool import gated_attention_pool
from hmil_fast.kernels.proof import Measure
from hmil_fast.kernels.verdict import Verdict

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HMIL_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_cpu_runs_the_reference() -> None:
    assert choose(CPU) == ("reference", "the tensors are on a CPU", None)


def test_the_interpreter_runs_the_kernels_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(CPU).name == "reference"
    monkeypatch.setenv("HMIL_KERNELS", "fused")
    assert choose(CPU) == ("fused", "HMIL_KERNELS=fused", None)


def test_reference_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HMIL_KERNELS", "reference")
    assert choose(torch.device("cuda", 0)) == ("reference", "HMIL_KERNELS=reference", None)


def test_the_precision_of_products_is_read_however_it_was_set() -> None:
    code = (
        "import torch\n"
        "from hmil_fast.kernels.dispatch import choose, exact_products\n"
        "said = [exact_products()]\n"
        "for word in ('high', 'highest', 'medium'):\n"
        "    torch.set_float32_matmul_precision(word)\n"
        "    said.append(exact_products())\n"
        "for word in ('ieee', 'tf32'):\n"
        "    torch.backends.cuda.matmul.fp32_precision = word\n"
        "    said.append(exact_products())\n"
        "choose(torch.device('cpu'))\n"
        "print(said)\n"
    )
    done = subprocess.run(  # settings of a process of its own
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[True, False, True, False, True, False]", done.stderr


@pytest.mark.gpu
def test_a_gpu_runs_the_kernels_that_it_passes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice = choose(device)
    assert choice is choose(device)
    if torch.cuda.get_device_capability(device) < (8, 0):
        assert (choice.name, choice.verdict) == ("reference", None)
        return
    assert choice.verdict is not None
    assert choice.name == "fused", choice.verdict.text()
    assert [str(path) for path in tmp_path.rglob("*.json")] == [choice.verdict.place]
    for wish in ("fused", "reference"):
        monkeypatch.setenv("HMIL_KERNELS", wish)
        assert choose(device) == (wish, f"HMIL_KERNELS={wish}", None)


def test_a_gpu_that_passes_runs_the_kernels(recwarn: pytest.WarningsRecorder) -> None:
    verdict = Verdict((Measure("supcon fp32", "lse", 1e-7, 1e-5),))
    assert judged(verdict, "a GPU") == ("fused", "its check passed", verdict)
    assert not recwarn.list


@pytest.mark.parametrize("raised", ["", "supcon fp32: CompilationError: no"])
def test_a_gpu_that_fails_runs_the_reference_and_gives_the_numbers(raised: str) -> None:
    verdict = Verdict((Measure("supcon fp32", "lse", 0.05, 1e-5),), raised)
    with pytest.warns(RuntimeWarning) as said:
        choice = judged(verdict, "NVIDIA H200")
    assert (choice.name, choice.verdict) == ("reference", verdict)
    assert len(said) == 1
    text = str(said[0].message)
    assert text.startswith("the fused kernels fail their check on NVIDIA H200; the reference runs")
    assert "supcon fp32, lse: 5.0e-02 (≤ 1.0e-05)" in text
    assert text.endswith(raised or ")")


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("triton", "HMIL_KERNELS is 'triton'; set it to reference or fused, or unset it"),
        ("fused", "HMIL_KERNELS is 'fused', but .*; unset it or set it to reference"),
    ],
)
def test_bad_wishes_are_named(wish: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HMIL_KERNELS", wish)
    with pytest.raises(ValueError, match=said):
        choose(CPU)
    x, gate, bias = torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match=said):
        gated_attention_pool(
            x, gate, bias, gate, bias, torch.zeros(1, 3), torch.zeros(1), torch.tensor([[0, 4]])
        )
