import pytest
import torch
from torch import Tensor

from hmil_fast.kernels.hierarchy_alignment import hierarchy_alignment

PARENT = torch.tensor([0, 0, 0, 1, 1, 2, 2])
BAGS = torch.tensor([[0, 5], [9, 0], [5, 1], [8, 20]])


def _levels(std: float = 1.0, rows: int = 30, bags: Tensor = BAGS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for classes in (3, 7):
        logits = std * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
        lse = [logits[s : s + n].logsumexp(0) for s, n in bags.tolist()]
        out += [logits, torch.stack(lse)]
    return out


def _by_hand(levels: list[Tensor], average: bool, bags: Tensor = BAGS) -> Tensor:
    values = []
    for b, (start, length) in enumerate(bags.tolist()):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(start, start + length):
            coarse = (levels[0][i] - levels[1][b]).exp()
            fine = (levels[2][i] - levels[3][b]).exp()
            summed = torch.stack([fine[c == PARENT].sum() for c in range(3)])
            if average:
                summed = summed / PARENT.bincount()
            total = total + 1 - coarse @ summed / (coarse.norm() * summed.norm())
        values.append(total / max(length, 1))
    return torch.stack(values)


@pytest.mark.parametrize("average", [False, True])
def test_equals_the_formula_and_its_gradient(average: bool) -> None:
    levels = [t.requires_grad_() for t in _levels()]
    ours = hierarchy_alignment(*levels, PARENT, BAGS, average=average)
    theirs = _by_hand(levels, average)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    weights = torch.tensor([1.0, 2.0, -3.0, 4.0], dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(ours @ weights, levels),
        torch.autograd.grad(theirs @ weights, levels),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_float32_is_exact_where_cosine_similarity_saturates() -> None:
    bags = torch.tensor([[0, 20_000]])
    levels = _levels(8.0, 20_000, bags)
    exact = hierarchy_alignment(*levels, PARENT, bags)
    single = hierarchy_alignment(*(t.float() for t in levels), PARENT, bags)
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=0)
    coarse, fine = (levels[0] - levels[1]).exp().float(), (levels[2] - levels[3]).exp().float()
    summed = fine @ torch.nn.functional.one_hot(PARENT).float()
    clamped = 1 - torch.cosine_similarity(coarse, summed, dim=1).mean()
    assert abs(clamped - exact) > 0.1


def test_float32_survives_attention_that_underflows() -> None:
    levels = _levels(60.0)
    exact = hierarchy_alignment(*levels, PARENT, BAGS)
    single = [t.float().requires_grad_() for t in levels]
    ours = hierarchy_alignment(*single, PARENT, BAGS)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)
    ours.sum().backward()
    assert all(t.grad.isfinite().all() for t in single)


def test_uniform_attention_reaches_zero_only_when_averaged() -> None:
    logits = [torch.zeros(10, 3), torch.zeros(10, 7)]
    lse = [torch.full((1, 3), 10.0).log(), torch.full((1, 7), 10.0).log()]
    bags = torch.tensor([[0, 10]])
    arguments = (logits[0], lse[0], logits[1], lse[1], PARENT, bags)
    assert hierarchy_alignment(*arguments).item() == pytest.approx(0.0198, abs=5e-5)
    assert hierarchy_alignment(*arguments, average=True).item() == pytest.approx(0, abs=1e-12)


def test_empty_bag_is_zero_without_gradient() -> None:
    levels = [t.requires_grad_() for t in _levels()]
    value = hierarchy_alignment(*levels, PARENT, BAGS)
    assert value[1] == 0
    value.sum().backward()
    assert all(t.grad.isfinite().all() for t in levels)
    assert (levels[1].grad[1] == 0).all()


def test_bag_of_nans_touches_no_other_bag() -> None:
    levels = _levels()
    clean = hierarchy_alignment(*levels, PARENT, BAGS)
    levels[0][0:5], levels[1][0] = torch.nan, torch.nan
    dirty = hierarchy_alignment(*levels, PARENT, BAGS)
    assert dirty[0].isnan()
    assert torch.equal(dirty[1:], clean[1:])


@pytest.mark.parametrize(
    ("position", "bad", "said"),
    [
        (0, torch.zeros(30, dtype=torch.int64), "coarse_logits is torch.int64"),
        (1, torch.zeros(3, 3), r"coarse_lse has shape \[3, 3\].*\[4, 3\]"),
        (2, torch.zeros(29, 7), "fine_logits has 29 rows, coarse_logits 30"),
        (4, torch.zeros(6, dtype=torch.int64), r"parent is torch.int64 \[6\]"),
        (
            2,
            torch.zeros(30, 7, device="meta"),
            "fine_logits is on meta, coarse_logits on cpu; move",
        ),
        (4, torch.tensor([0, 0, 0, 1, 1, 2, 3]), "give coarse classes from 0 to 2"),
        (5, torch.tensor([[0, 5], [9, 0], [5, 1], [28, 20]]), r"bags\[3\] = \(28, 20\)"),
    ],
)
def test_bad_arguments_are_named(position: int, bad: Tensor, said: str) -> None:
    arguments = [*_levels(), PARENT, BAGS]
    arguments[position] = bad
    with pytest.raises(ValueError, match=said):
        hierarchy_alignment(*arguments)
