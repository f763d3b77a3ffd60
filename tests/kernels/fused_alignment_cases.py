"""The fused kernels of hierarchy_alignment against float64, as fused_supcon_cases.py runs them."""

import pytest
import torch
from torch import Tensor

from hmil_fast.kernels.bags import check_bags
from hmil_fast.kernels.dispatch import interpreted
from hmil_fast.kernels.hierarchy_alignment import fused, hierarchy_alignment
from hmil_fast.kernels.hierarchy_alignment.op import alignment
from hmil_fast.kernels.hierarchy_alignment.streaming import (
    alignment_streaming,
    alignment_streaming_backward,
)

DEVICE = torch.device("cpu" if interpreted() else "cuda")
DTYPES = [torch.float64, torch.float32] if interpreted() else [torch.float32]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
ROWS = fused.ROWS
LENGTHS = [5, 0, 1, 2, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 5]
EDGES = torch.tensor([0, *LENGTHS]).cumsum(0)
PACKED = torch.stack([EDGES[:-1], torch.tensor(LENGTHS)], dim=1)
SOME = PACKED[torch.tensor([7, 1, 4, 2, 6])]  # in another order, rows in no bag
PARENT = torch.tensor([0, 0, 0, 1, 1, 2, 2])


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _operands(bags: Tensor, classes: tuple[int, int], std: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for count in classes:
        shape = (int(EDGES[-1]), count)
        logits = std * torch.randn(shape, generator=generator, dtype=torch.float64)
        lse = [logits[start : start + length].logsumexp(0) for start, length in bags.tolist()]
        out += [logits, torch.stack(lse)]
    return out


def _check(
    operands: list[Tensor], parent: Tensor, bags: Tensor, average: bool, dtype: torch.dtype
) -> None:
    spans = check_bags(bags, int(EDGES[-1]))
    grad = torch.arange(1, len(bags) + 1, dtype=torch.float64)
    a, a_lse, b, b_lse = operands
    exact = [
        alignment_streaming((a, a_lse), (b, b_lse), parent, spans, average),
        *alignment_streaming_backward(grad, (a, a_lse), (b, b_lse), parent, spans, average),
    ]
    a, a_lse, b, b_lse, grad = (t.to(DEVICE, dtype) for t in (*operands, grad))
    there = parent.to(DEVICE)
    ours = [
        fused.alignment_fused((a, a_lse), (b, b_lse), there, spans, average),
        *fused.alignment_fused_backward(grad, (a, a_lse), (b, b_lse), there, spans, average),
    ]
    scale = max(t.norm() for t in exact[1:])  # one class alone has no gradient but rounding
    for k, (one, other) in enumerate(zip(ours, exact, strict=True)):
        error = (one.cpu().double() - other).norm()
        assert error <= TOLERANCE[dtype] * (exact[0].norm() + scale if k else 1), k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("classes", [(1, 1), (1, 2), (2, 5), (3, 7), (7, 16), (16, 17), (32, 32)])
def test_odd_sizes(classes: tuple[int, int], average: bool, dtype: torch.dtype) -> None:
    parent = torch.arange(classes[1]) * classes[0] // classes[1]
    _check(_operands(PACKED, classes), parent, PACKED, average, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bags_in_another_order_and_rows_in_no_bag(dtype: torch.dtype) -> None:
    _check(_operands(SOME, (3, 7)), PARENT, SOME, False, dtype)


def test_attention_that_underflows() -> None:
    _check(_operands(PACKED, (3, 7), 60.0), PARENT, PACKED, False, torch.float32)


def _moved(operands: list[Tensor]) -> list[Tensor]:
    return [t.to(DEVICE, torch.float32) for t in operands]


def test_bag_alone_packed_and_beside_nans() -> None:
    a, a_lse, b, b_lse = _moved(_operands(PACKED, (3, 7)))
    parent = PARENT.to(DEVICE)
    packed = hierarchy_alignment(a, a_lse, b, b_lse, parent, PACKED)
    assert packed[1] == 0
    for k, (start, length) in enumerate(PACKED.tolist()):
        at, own = slice(start, start + length), slice(k, k + 1)
        bags = torch.tensor([[0, length]])
        alone = hierarchy_alignment(a[at], a_lse[own], b[at], b_lse[own], parent, bags)
        assert torch.equal(alone[0], packed[k])
    bad = 3
    a[PACKED[bad, 0]] = torch.nan
    dirty = hierarchy_alignment(a, a_lse, b, b_lse, parent, PACKED)
    assert dirty[bad].isnan()
    others = torch.arange(len(PACKED)) != bad
    assert torch.equal(dirty[others], packed[others])


def test_no_bags_and_bags_that_overlap() -> None:
    a, a_lse, b, b_lse = _moved(_operands(PACKED, (3, 7)))
    parent = PARENT.to(DEVICE)
    none = hierarchy_alignment(a, a_lse[:0], b, b_lse[:0], parent, PACKED[:0])
    assert none.shape == (0,)
    twice = torch.tensor([6, 6])
    levels = [a.requires_grad_(), a_lse[twice], b, b_lse[twice]]
    value = hierarchy_alignment(*levels, parent, PACKED[twice])
    once = hierarchy_alignment(a, a_lse[6:7], b, b_lse[6:7], parent, PACKED[6:7])
    torch.testing.assert_close(value, once.expand(2))
    grads = [torch.autograd.grad(t.sum(), a)[0] for t in (value, once)]
    torch.testing.assert_close(grads[0], 2 * grads[1])


def test_op_checks() -> None:
    bags = torch.tensor([[3, 140], [150, 2]])
    levels = [t.to(DEVICE, DTYPES[0]).requires_grad_() for t in _operands(bags, (2, 3))]
    parent = torch.tensor([0, 0, 1], device=DEVICE)
    torch.library.opcheck(alignment, (*levels, parent, bags, False))


@pytest.mark.skipif(not interpreted(), reason="needs float64")
def test_gradcheck() -> None:
    bags, parent = torch.tensor([[3, 140], [150, 2]]), torch.tensor([0, 0, 1])
    levels = [t.requires_grad_() for t in _operands(bags, (2, 3))]
    assert torch.autograd.gradcheck(
        lambda *levels: hierarchy_alignment(*levels, parent, bags), levels, fast_mode=True
    )
