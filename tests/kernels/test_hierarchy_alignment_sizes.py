"""hierarchy_alignment over many bags, bags of several chunks, and torch's own checks."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hmil_fast.kernels.bags import check_bags
from hmil_fast.kernels.hierarchy_alignment import hierarchy_alignment, streaming
from hmil_fast.kernels.hierarchy_alignment.op import alignment
from hmil_fast.kernels.hierarchy_alignment.reference import alignment_reference

PARENT = torch.tensor([0, 0, 0, 1, 1, 2, 2])
LENGTHS = [0, 1, 2, 7, 8, 9, 29, 3, 0, 5]  # around the chunk of 8 that the tests set


def _packed(lengths: list[int]) -> Tensor:
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    return torch.stack([starts, torch.tensor(lengths)], dim=1)


def _levels(bags: Tensor, rows: int, std: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    out = []
    for classes in (3, 7):
        logits = std * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
        lse = [logits[s : s + n].logsumexp(0) for s, n in bags.tolist()]
        out += [logits, torch.stack(lse)]
    return out


def _both(levels: list[Tensor], value: Tensor) -> list[Tensor]:
    weights = torch.arange(1, len(value) + 1, dtype=value.dtype)
    return [value, *torch.autograd.grad(value @ weights, levels)]


PACKED = _packed(LENGTHS)
SHUFFLED = PACKED[torch.tensor([3, 9, 0, 6, 1, 2, 8, 5, 4, 7])]
OVERLAPPING = torch.cat([PACKED, torch.tensor([[0, 40], [20, 30]])])


@pytest.mark.parametrize("alone", [1, 5, 99], ids="alone from {} rows on".format)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(
    "bags",
    [PACKED, SHUFFLED, OVERLAPPING, PACKED[:0]],
    ids=["packed", "shuffled", "overlapping", "none"],
)
def test_chunks_equal_the_formula(
    monkeypatch: pytest.MonkeyPatch, bags: Tensor, average: bool, alone: int
) -> None:
    monkeypatch.setattr(streaming, "_CHUNK", 8)
    monkeypatch.setattr(streaming, "_ALONE", alone)
    rows = sum(LENGTHS)
    levels = _levels(PACKED, rows)
    if not len(bags):
        levels[1], levels[3] = levels[1][:0], levels[3][:0]
    else:
        levels[1::2] = _levels(bags, rows)[1::2]
    levels = [t.requires_grad_() for t in levels]
    spans = check_bags(bags, rows)
    coarse, fine = (levels[0], levels[1]), (levels[2], levels[3])
    exact = _both(levels, alignment_reference(coarse, fine, PARENT, spans, average))
    ours = _both(levels, hierarchy_alignment(*levels, PARENT, bags, average=average))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("std", [1.0, 8.0])
def test_float32_is_exact_at_100_000_peaky_instances(std: float) -> None:
    bags = torch.tensor([[0, 100_000]])
    levels = [t.requires_grad_() for t in _levels(bags, 100_000, std)]
    exact = _both(levels, hierarchy_alignment(*levels, PARENT, bags))
    single = [t.detach().float().requires_grad_() for t in levels]
    ours = _both(single, hierarchy_alignment(*single, PARENT, bags))
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=0)
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert (a.double() - b).norm() <= 2e-5 * b.norm()
    if std == 8.0:
        coarse, fine = ((levels[k] - levels[k + 1]).exp().float() for k in (0, 2))
        summed = fine @ torch.nn.functional.one_hot(PARENT).float()
        clamped = 1 - torch.cosine_similarity(coarse, summed, dim=1).mean()
        assert abs(clamped - exact[0]) > 0.1


@pytest.mark.parametrize("average", [False, True])
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, average: bool) -> None:
    monkeypatch.setattr(streaming, "_CHUNK", 4)
    bags = torch.tensor([[6, 5], [0, 0], [0, 3]])
    levels = [t.requires_grad_() for t in _levels(bags, 12)]
    levels[1].data[1], levels[3].data[1] = 0, 0  # −inf of the empty bag has no differences
    assert torch.autograd.gradcheck(
        lambda *levels: hierarchy_alignment(*levels, PARENT, bags, average=average), levels
    )


def test_gradient_vanishes_where_the_attentions_agree() -> None:
    bags = torch.tensor([[0, 50]])
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    levels = [logits, logits.logsumexp(0)[None], logits.clone(), logits.logsumexp(0)[None]]
    levels = [t.requires_grad_() for t in levels]
    value, *grads = _both(levels, hierarchy_alignment(*levels, torch.arange(3), bags))
    assert value.item() < 1e-12
    assert all(grad.abs().max() < 1e-7 for grad in grads)


def test_backward_under_autocast_stays_in_float32() -> None:
    bags = PACKED[1:]
    levels = [t.float().requires_grad_() for t in _levels(PACKED, sum(LENGTHS))]
    levels = [levels[0], levels[1][1:], levels[2], levels[3][1:]]
    plain = _both(levels, hierarchy_alignment(*levels, PARENT, bags))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = hierarchy_alignment(*levels, PARENT, bags)
        cast = torch.autograd.grad(value, levels, torch.arange(1.0, len(value) + 1))
    for a, b in zip([value, *cast], plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_custom_op_checks() -> None:
    bags = torch.tensor([[6, 5], [0, 3]])
    levels = [t.requires_grad_() for t in _levels(bags, 12)]
    torch.library.opcheck(alignment, (*levels, PARENT, bags, False))


def test_compiles_as_one_graph() -> None:
    bags = torch.tensor([[6, 5], [0, 3]])
    levels = [t.requires_grad_() for t in _levels(bags, 12)]
    compiled = torch.compile(hierarchy_alignment, fullgraph=True, backend="aot_eager")
    ours = _both(levels, compiled(*levels, PARENT, bags))
    for a, b in zip(ours, _both(levels, hierarchy_alignment(*levels, PARENT, bags)), strict=True):
        torch.testing.assert_close(a, b)


PEAK = """
import torch
from hmil_fast.kernels.hierarchy_alignment import hierarchy_alignment

def kib(field):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

def peak(rows):
    parent, bags = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([[0, rows]])
    levels = [torch.randn(rows, 3), torch.ones(1, 3), torch.randn(rows, 7), torch.ones(1, 7)]
    before = kib("VmRSS")
    for level in levels:
        level.requires_grad_()
    hierarchy_alignment(*levels, parent, bags).sum().backward()
    return (kib("VmHWM") - before) / 1024

peak(1 << 16)  # what torch allocates once
print(peak(1_000_000))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_million_instances_take_little_beside_their_gradients() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=600
    )
    gradients = 1_000_000 * 10 * 4 / 2**20
    assert float(ran.stdout) < gradients + 24
