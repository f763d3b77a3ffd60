"""The fused kernels of supcon against float64, on a GPU or through Triton's interpreter.

test_losses_fused.py runs this file in a process of its own, because Triton decides when it is
imported whether it interprets; by hand:
`TRITON_INTERPRET=1 HMIL_KERNELS=fused pytest tests/kernels/fused_supcon_cases.py`.
"""

import pytest
import torch
from torch import Tensor

from hmil_fast.kernels.dispatch import choose, interpreted
from hmil_fast.kernels.supcon import fused, supcon
from hmil_fast.kernels.supcon.op import supcon_lse
from hmil_fast.kernels.supcon.reference import supcon_reference
from hmil_fast.kernels.supcon.streaming import lse_streaming, lse_streaming_backward

DEVICE = torch.device("cpu" if interpreted() else "cuda")
# float64 sums only through the interpreter; on a GPU such rows go the streaming way
DTYPES = [torch.float64, torch.float32] if interpreted() else [torch.float32]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}
SIZES = [(2, 3), (15, 16), (16, 5), (17, 33), (31, 8), (33, 20), (101, 7), (33, 256)]
SIZES += [(2, 257), (9, 300), (33, 300)]  # too wide to stay on the chip


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _rows(count: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    z = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(z), torch.randn(count, generator=generator).double()


def _error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.cpu().double() - exact).norm() / exact.norm()).item()


def _check(z: Tensor, grad: Tensor, tau: float, dtype: torch.dtype, limit: float) -> None:
    exact = lse_streaming(z, tau)
    d_exact = lse_streaming_backward(grad, z, exact, tau)
    z, grad, saved = (t.to(DEVICE, dtype) for t in (z, grad, exact))
    assert _error(fused.lse_fused(z, tau), exact) < limit
    assert _error(fused.lse_fused_backward(grad, z, saved, tau), d_exact) < limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [0.5, 0.01])
@pytest.mark.parametrize("size", SIZES)
def test_odd_sizes(size: tuple[int, int], tau: float, dtype: torch.dtype) -> None:
    # rounding of the products weighs 1/τ times as much
    _check(*_rows(*size), tau, dtype, TOLERANCE[dtype] * max(1, 0.1 / tau))


@pytest.mark.parametrize("dim", [6, 300])
@pytest.mark.parametrize("tau", [0.2, 0.01])
def test_shares_of_the_columns_add_up(
    monkeypatch: pytest.MonkeyPatch, tau: float, dim: int
) -> None:
    monkeypatch.setattr(fused, "_PROGRAMS", 40)
    count = 150 if interpreted() else 1500
    config = fused.configuration(torch.empty(0, dim, device=DEVICE), backward=False)
    shares, share = fused.column_shares(count, config, DEVICE)
    assert shares > 2
    assert (shares - 1) * share < count <= shares * share
    _check(*_rows(count, dim), tau, DTYPES[0], TOLERANCE[DTYPES[0]] * max(1, 0.1 / tau))
    z = _rows(count, dim)[0].to(DEVICE, torch.float32)
    assert torch.equal(fused.lse_fused(z, tau), fused.lse_fused(z, tau))


def test_rows_without_others() -> None:
    empty = torch.ones(0, 3, device=DEVICE)
    assert (fused.lse_fused(torch.ones(1, 3, device=DEVICE), 0.1) == 0).all()
    assert fused.lse_fused(empty, 0.1).shape == (0,)
    assert fused.lse_fused_backward(empty[:, 0], empty, empty[:, 0], 0.1).shape == (0, 3)


def test_long_rows_and_rows_with_gaps_between_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    z = 30 * torch.randn(9, 40, generator=generator, dtype=torch.float64).T
    ours = fused.lse_fused(z.to(DEVICE, torch.float32), 0.5)
    assert _error(ours, lse_streaming(z, 0.5)) < 1e-5


@pytest.mark.parametrize("dim", [64, 100, 256, 300])
def test_half_the_precision_where_asked(dim: int) -> None:
    """With products in tf32, where there are any."""
    torch.set_float32_matmul_precision("high")
    try:
        _check(*_rows(300, dim), 0.1, torch.float32, 1e-5 if interpreted() else 1e-2)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("tau", "eps"), [(0.2, 0.0), (0.01, 0.0), (0.2, 1e-6)])
def test_loss_and_gradient(tau: float, eps: float) -> None:
    assert choose(DEVICE).name == "fused"
    z, labels = _rows(41, 5)[0], torch.arange(41) % 4
    exact = supcon_reference(z.requires_grad_(), labels, tau, eps)
    ours = z.detach().to(DEVICE, DTYPES[0]).requires_grad_()
    loss = supcon(ours, labels.to(DEVICE), tau, eps=eps)
    assert _error(loss, exact) < 1e-6
    loss.backward()
    assert _error(ours.grad, torch.autograd.grad(exact, z)[0]) < 1e-4


def test_no_positives_and_half_precision_rows() -> None:
    z = _rows(21, 5)[0].to(DEVICE, torch.float16).requires_grad_()
    supcon(z, torch.arange(21, device=DEVICE), 0.2).backward()
    assert (z.grad == 0).all()
    supcon(z, torch.arange(21, device=DEVICE) % 2, 0.2).backward()
    assert z.grad.dtype == torch.float16
    assert z.grad.isfinite().all()


def test_op_checks() -> None:
    z = _rows(21, 5)[0].to(DEVICE, DTYPES[0]).requires_grad_()
    torch.library.opcheck(supcon_lse, (z, 0.2))


@pytest.mark.skipif(not interpreted(), reason="needs float64")
def test_gradcheck() -> None:
    z, labels = _rows(21, 5)[0].requires_grad_(), torch.arange(21) % 4
    assert torch.autograd.gradcheck(lambda z: supcon(z, labels, 0.2), z, fast_mode=True)
