"""supcon where the [R, R] matrix is the matter: several tiles, large R, and torch's own checks."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hmil_fast.kernels.supcon import streaming, supcon
from hmil_fast.kernels.supcon.op import supcon_lse
from hmil_fast.kernels.supcon.reference import supcon_reference


def _rows(count: int, dim: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    z = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (count,), generator=generator)
    return torch.nn.functional.normalize(z).to(dtype), labels


def _both(z: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    return loss, torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("tau", [0.5, 0.1, 0.01])
def test_float32_agrees_with_the_dense_formula_at_2048_rows(tau: float, eps: float) -> None:
    z, labels = _rows(2048)
    exact = _both(z.requires_grad_(), supcon_reference(z, labels, tau, eps))
    single = z.detach().float().requires_grad_()
    ours = _both(single, supcon(single, labels, tau, eps=eps))
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=0)
    error = (ours[1].double() - exact[1]).norm() / exact[1].norm()
    assert error < 5e-6


@pytest.mark.parametrize("tau", [0.2, 0.01])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 29])
def test_odd_numbers_of_tiles(monkeypatch: pytest.MonkeyPatch, count: int, tau: float) -> None:
    monkeypatch.setattr(streaming, "_TILE", 8)
    z, labels = _rows(count)
    z.requires_grad_()
    exact = _both(z, supcon_reference(z, labels, tau, 0.0))
    for ours, theirs in zip(_both(z, supcon(z, labels, tau)), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("tau", [0.2, 0.01])
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, tau: float) -> None:
    monkeypatch.setattr(streaming, "_TILE", 4)
    z, labels = _rows(9, 3)
    levels = torch.stack([labels // 2, labels], dim=1)
    z.requires_grad_()
    for eps in (0.0, 1e-6):
        assert torch.autograd.gradcheck(lambda z, eps=eps: supcon(z, levels, tau, eps=eps), z)


def test_rows_that_are_not_of_unit_length_do_not_overflow() -> None:
    z, labels = _rows(40)
    single = (30 * z).float().requires_grad_()
    loss = supcon(single, labels, 0.1)
    expected = supcon_reference(30 * z, labels, 0.1, 0.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    assert single.grad.isfinite().all()


def test_levels_share_the_sums_and_equal_one_call_each() -> None:
    z, labels = _rows(50)
    z.requires_grad_()
    levels = torch.stack([labels // 2, labels, torch.arange(50)], dim=1)
    together = supcon(z, levels, 0.1)
    apart = torch.stack([supcon(z, level, 0.1) for level in levels.T])
    assert torch.equal(together, apart)
    assert together[2] == 0
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    a, b = (torch.autograd.grad(t @ weights, z)[0] for t in (together, apart))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_two_runs_give_the_same_bits() -> None:
    z, labels = _rows(2500, dtype=torch.float32)
    runs = [_both(z.requires_grad_(), supcon(z, labels, 0.1)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_get_a_gradient_in_their_dtype(dtype: torch.dtype) -> None:
    z, labels = _rows(40, dtype=dtype)
    z = torch.cat([z, z], dim=1)[:, 3:19].requires_grad_()  # rows with gaps between them
    loss, grad = _both(z, supcon(z, labels, 0.1))
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss, supcon_reference(z.float(), labels, 0.1, 0.0))


def test_backward_under_autocast_stays_in_float32() -> None:
    z, labels = _rows(40, dtype=torch.float32)
    z.requires_grad_()
    plain = torch.autograd.grad(supcon(z, labels, 0.1), z)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.autograd.grad(supcon(z, labels, 0.1), z)[0], plain)


def test_second_derivatives_are_refused() -> None:
    z, labels = _rows(10)
    z.requires_grad_()
    grad = torch.autograd.grad(supcon(z, labels, 0.1), z, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (grad**2).sum().backward()


@pytest.mark.parametrize("tau", [0.2, 0.01])
def test_custom_op_checks(tau: float) -> None:
    z, _ = _rows(20)
    torch.library.opcheck(supcon_lse, (z.requires_grad_(), tau))


def test_compiles_as_one_graph() -> None:
    z, labels = _rows(20, dtype=torch.float32)
    z.requires_grad_()
    compiled = torch.compile(supcon, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(
        _both(z, compiled(z, labels, 0.1)), _both(z, supcon(z, labels, 0.1)), strict=True
    ):
        torch.testing.assert_close(ours, plain)


PEAK = """
import sys
import torch
from hmil_fast.kernels.supcon import supcon

def kib(field):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

def step(rows):
    z = torch.nn.functional.normalize(torch.randn(rows, 32)).requires_grad_()
    supcon(z, torch.arange(rows) % 7, 0.1).backward()

step(1024)  # what torch allocates once
before = kib("VmRSS")
step(int(sys.argv[1]))
print((kib("VmHWM") - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_grows_with_the_rows_and_not_with_their_square() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, "8192"],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    # one [R, R] matrix is 256 MiB, z is 1 MiB
    assert float(ran.stdout) < 40
