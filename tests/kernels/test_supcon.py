import math

import pytest
import torch
from torch import Tensor

from hmil_fast.kernels.supcon import supcon

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3])


def _rows(count: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(z)


def _by_hand(z: Tensor, labels: Tensor, tau: float, eps: float = 0.0) -> Tensor:
    losses = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [a for a in others if labels[a] == labels[i]]
        if not positives:
            continue
        total = sum(((z[i] @ z[a] - 1) / tau).exp() for a in others) + eps
        terms = [(z[i] @ z[p] - 1) / tau - total.log() for p in positives]
        losses.append(-sum(terms) / (len(positives) + eps))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_equals_the_formula_and_its_gradient(tau: float, eps: float) -> None:
    z = _rows().requires_grad_()
    ours, theirs = supcon(z, LABELS, tau, eps=eps), _by_hand(z, LABELS, tau, eps)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    ours_grad, theirs_grad = torch.autograd.grad(ours, z)[0], torch.autograd.grad(theirs, z)[0]
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-11, atol=1e-13)


def test_low_temperature_in_float32_stays_finite_and_right() -> None:
    z = _rows()
    single = z.float().requires_grad_()
    loss = supcon(single, LABELS, 0.005)
    torch.testing.assert_close(loss.double(), supcon(z, LABELS, 0.005), rtol=1e-4, atol=0)
    loss.backward()
    assert single.grad.isfinite().all()


def test_identical_rows_give_the_logarithm_of_the_others() -> None:
    z = torch.ones(6, 4) / 2
    assert supcon(z, torch.zeros(6, dtype=torch.int64), 0.1).item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("count", [0, 1, 4])
def test_without_positives_the_loss_and_its_gradient_are_zero(count: int) -> None:
    z = _rows(count).requires_grad_()
    for eps in (0.0, 1e-6):
        loss = supcon(z, torch.arange(count), 0.1, eps=eps)
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, z)[0] == 0).all()


def test_autocast_keeps_float32() -> None:
    z = _rows().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(supcon(z, LABELS, 0.1), supcon(z.clone(), LABELS, 0.1))
        cast = supcon(z, LABELS, 0.1)
    assert torch.equal(cast, supcon(z, LABELS, 0.1))


@pytest.mark.parametrize(
    ("z", "labels", "tau", "said"),
    [
        (torch.zeros(7), LABELS, 0.1, r"z is torch.float32 \[7\]"),
        (torch.zeros(7, 2), LABELS[:6], 0.1, r"labels is torch.int64 \[6\]; give int64 \[7\]"),
        (torch.zeros(7, 2), LABELS.float(), 0.1, "labels is torch.float32"),
        (torch.zeros(7, 2), LABELS, 0.0, "temperature is 0.0; give a finite number above 0"),
        (torch.zeros(7, 2), LABELS, math.nan, "temperature is nan"),
        (torch.zeros(7, 2), LABELS, math.inf, "temperature is inf; give a finite number"),
        (torch.zeros(7, 2), LABELS[:6, None], 0.1, r"labels is torch.int64 \[6, 1\].*\[7, L\]"),
        (torch.zeros(7, 2), LABELS.to("meta"), 0.1, "labels is on meta, z on cpu; move labels"),
    ],
)
def test_bad_arguments_are_named(z: Tensor, labels: Tensor, tau: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        supcon(z, labels, tau)


@pytest.mark.parametrize("eps", [-1e-6, math.nan, math.inf])
def test_bad_eps_is_named(eps: float) -> None:
    with pytest.raises(ValueError, match=f"eps is {eps}; give a finite number of at least 0"):
        supcon(_rows(), LABELS, 0.1, eps=eps)
