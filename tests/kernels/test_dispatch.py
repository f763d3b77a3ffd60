import pytest
import torch

from hmil_fast.kernels.dispatch import choose, describe
from hmil_fast.kernels.gated_attention_pool import gated_attention_pool

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HMIL_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_cpu_runs_the_reference() -> None:
    assert choose(CPU) == ("reference", "the tensors are on a CPU")


def test_the_interpreter_runs_the_kernels_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(CPU).name == "reference"
    monkeypatch.setenv("HMIL_KERNELS", "fused")
    assert choose(CPU) == ("fused", "HMIL_KERNELS=fused")


def test_reference_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HMIL_KERNELS", "reference")
    assert choose(torch.device("cuda", 0)) == ("reference", "HMIL_KERNELS=reference")


@pytest.mark.gpu
def test_a_gpu_runs_the_kernels_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    assert choose(device).name == "reference"
    monkeypatch.setenv("HMIL_KERNELS", "fused")
    assert choose(device) == ("fused", "HMIL_KERNELS=fused")


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


def test_people_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert describe() == "reference on cpu: the tensors are on a CPU"
    monkeypatch.setenv("HMIL_KERNELS", "reference")
    assert describe().endswith(": HMIL_KERNELS=reference")
    monkeypatch.setenv("HMIL_KERNELS", "both")
    assert describe().startswith("HMIL_KERNELS is 'both'")
