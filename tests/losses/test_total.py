"""Every term of the presets paper and released against formulas written here, in float64."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree
from hmil_fast.losses import HmilLoss
from hmil_fast.losses.curriculum import curriculum, tau_released
from hmil_fast.losses.hierarchy import bag_alignment, bag_alignment_released

BRACS = LabelTree.from_nested({"b": ["N", "PB", "UDH"], "a": ["FEA", "ADH"], "m": ["DCIS", "IC"]})
DEEP = LabelTree.from_nested({"x": {"p": ["1", "2"], "q": ["3"]}, "y": {"r": ["4", "5"]}})
UNEVEN = LabelTree.from_nested(
    {"n": None, "p": {"micro": None, "macro": ["large", "small"], "only": ["end"]}}
)
FLAT = LabelTree.from_nested(["u", "v", "w"])
PUBLISHED = ("paper", "released")
BAGS = torch.tensor([[0, 4], [4, 1], [5, 20], [25, 0]])


class Output(NamedTuple):
    logits: tuple[Tensor, ...]
    attention_logits: tuple[Tensor, ...]
    lse: tuple[Tensor, ...]
    embeddings: Tensor | None


def _output(tree: LabelTree) -> Output:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.requires_grad_()

    attention = tuple(draw(25, k) for k in tree.num_classes)
    lse = tuple(
        torch.stack([a[s : s + n].logsumexp(0) for s, n in BAGS.tolist()]) for a in attention
    )
    rows = torch.nn.functional.normalize(draw(4, tree.num_classes[-1], 6), dim=2)
    return Output(tuple(draw(4, k) for k in tree.num_classes), attention, lse, rows)


def _targets(tree: LabelTree) -> Tensor:
    return torch.from_numpy(tree.ancestors()).T[torch.tensor([0, 1, 1, 2])]


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    rows = [row[t].exp() / row.exp().sum() for row, t in zip(logits, target, strict=True)]
    return -torch.stack(rows).log().mean()


def _summed(tree: LabelTree, output: Output, l: int) -> Tensor:
    p = output.logits[l + 1].exp() / output.logits[l + 1].exp().sum(1, keepdim=True)
    mapping = torch.zeros(tree.num_classes[l], tree.num_classes[l + 1], dtype=torch.float64)
    for child, parent in enumerate(tree.parents[l]):
        mapping[parent, child] = 1
    return p @ mapping.T


def _ham(tree: LabelTree, output: Output, l: int) -> Tensor:
    per_bag = []
    for b, (start, n) in enumerate(BAGS.tolist()):
        cosines = [torch.ones((), dtype=torch.float64)] if not n else []
        for i in range(start, start + n):
            coarse = (output.attention_logits[l][i] - output.lse[l][b]).exp()
            fine = (output.attention_logits[l + 1][i] - output.lse[l + 1][b]).exp()
            summed = [
                sum(fine[f] for f, p in enumerate(tree.parents[l]) if p == c)
                for c in range(tree.num_classes[l])
            ]
            v = torch.stack(summed)
            cosines.append((coarse @ v) / (coarse @ coarse).sqrt() / (v @ v).sqrt())
        per_bag.append(1 - torch.stack(cosines).mean())
    return torch.stack(per_bag).mean()


def _supcon(output: Output, leaf: Tensor, tau: float, released: bool) -> Tensor:
    z = output.embeddings.flatten(0, 1)
    y = leaf.repeat_interleave(output.embeddings.shape[1]).tolist()
    eps, anchors = (1e-6 if released else 0.0), []
    for i in range(len(y)):
        s = (z @ z[i] - 1) / tau
        denominator = sum(s[a].exp() for a in range(len(y)) if a != i) + eps
        log_p = [s[p] - denominator.log() for p in range(len(y)) if p != i and y[p] == y[i]]
        anchors.append(-sum(log_p) / (len(log_p) + eps))
    loss = torch.stack(anchors).mean()
    return loss * (tau / 0.1) / len(leaf) if released else loss


def _expected(
    tree: LabelTree, preset: str, progress: float
) -> tuple[Output, Tensor, dict[str, Tensor]]:
    output, targets, released = _output(tree), _targets(tree), preset == "released"
    tau = 0.1 + 0.45 * (1 + math.cos(2 * math.pi * progress)) if released else 0.1
    weight = 1 - progress**2 if released else 1 - progress
    terms = {"fine": _cross_entropy(output.logits[-1], targets[:, -1])}
    pairs = range(tree.num_levels - 1)
    if pairs:
        terms["coarse"] = torch.stack(
            [_cross_entropy(output.logits[l], targets[:, l]) for l in pairs]
        ).mean()
        summed = [_summed(tree, output, l) for l in pairs]
        terms["hba"] = torch.stack(
            [
                _cross_entropy(q if released else q.log(), targets[:, l])
                for l, q in enumerate(summed)
            ]
        ).mean()
        terms["ham"] = torch.stack([_ham(tree, output, l) for l in pairs]).mean()
    terms["supcon"] = _supcon(output, targets[:, -1], tau, released)
    zero = torch.zeros(())
    coarse, hba, ham = (terms.get(name, zero) for name in ("coarse", "hba", "ham"))
    total = terms["fine"] + (1 - weight) * terms["supcon"]
    total = total + (weight * coarse + hba if released else weight * (coarse + hba + ham))
    return output, total, terms


@pytest.mark.parametrize(
    "tree", [BRACS, DEEP, UNEVEN, FLAT], ids=["two levels", "three", "uneven", "one"]
)
@pytest.mark.parametrize("preset", PUBLISHED)
@pytest.mark.parametrize("epoch", [0, 3, 9])
def test_presets_equal_the_table(tree: LabelTree, preset: str, epoch: int) -> None:
    output, total, terms = _expected(tree, preset, epoch / 10)
    ours = HmilLoss(tree, preset)(output, BAGS, _targets(tree), epoch, 10)
    assert ours.terms.keys() == terms.keys()
    for name, term in terms.items():
        torch.testing.assert_close(ours.terms[name], term.detach(), rtol=1e-11, atol=1e-12)
        assert not ours.terms[name].requires_grad
    torch.testing.assert_close(ours.total, total, rtol=1e-11, atol=1e-12)
    leaves = [*output.logits, *output.attention_logits, output.embeddings]
    grads = [
        torch.autograd.grad(t, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for t in (ours.total, total)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("classes", "floor"), [(2, 0.313), (3, 0.551)])
def test_released_bag_alignment_cannot_reach_zero(classes: int, floor: float) -> None:
    certain = 1e4 * torch.eye(classes, dtype=torch.float64)
    parent = target = torch.arange(classes)
    best = bag_alignment_released(certain, parent, target, classes).item()
    assert best == pytest.approx(floor, abs=5e-4)
    assert best == pytest.approx(math.log(1 + (classes - 1) / math.e), abs=1e-12)
    assert bag_alignment(certain, parent, target).item() == 0
    wrong = bag_alignment_released(certain, parent, target.roll(1), classes).item()
    assert wrong == pytest.approx(floor + 1, abs=5e-4)


def test_released_differs_from_paper_as_the_table_says() -> None:
    """At p = 0.5, from the reported terms alone: what is in the total, and with what weight."""
    output, targets = _output(BRACS), _targets(BRACS)
    paper = HmilLoss(BRACS, "paper")(output, BAGS, targets, 5, 10)
    terms = {name: value.item() for name, value in paper.terms.items()}
    group = terms["coarse"] + terms["ham"] + terms["hba"]
    expected = terms["fine"] + 0.5 * group + 0.5 * terms["supcon"]
    assert paper.total.item() == pytest.approx(expected, rel=1e-12)
    released = HmilLoss(BRACS, "released")(output, BAGS, targets, 5, 10)
    terms = {name: value.item() for name, value in released.terms.items()}
    expected = terms["fine"] + 0.75 * terms["coarse"] + terms["hba"] + 0.25 * terms["supcon"]
    assert released.total.item() == pytest.approx(expected, rel=1e-12)
    assert terms["ham"] == pytest.approx(paper.terms["ham"].item())
    # half-way τ is 0.1 in both: what is left is the division by the four bags
    assert terms["supcon"] == pytest.approx(paper.terms["supcon"].item() / 4, rel=1e-4)
    for attention in output.attention_logits:
        grad = torch.autograd.grad(
            released.total, attention, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        assert not grad[0].any()


def test_bag_alignment_survives_certainty_in_the_wrong_class() -> None:
    logits = torch.tensor([[500.0, 0.0, 0.0]], requires_grad=True)
    loss = bag_alignment(logits, torch.tensor([0, 1, 1]), torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(500 - math.log(2))
    assert logits.grad.isfinite().all()


def test_schedules() -> None:
    assert [curriculum("linear", e) for e in (0, 0.25, 1)] == [(1, 0), (0.75, 0.25), (0, 1)]
    assert [curriculum("square", e) for e in (0, 0.5, 1)] == [(1, 0), (0.75, 0.25), (0, 1)]
    assert [curriculum("constant", e) for e in (0, 0.5, 1)] == [(1, 1)] * 3
    assert [tau_released(e) for e in (0, 0.25, 0.5, 1)] == pytest.approx([1, 0.55, 0.1, 1])


@pytest.mark.parametrize("preset", PUBLISHED)
def test_terms_without_inputs_are_left_out(preset: str) -> None:
    output = Output(_output(BRACS).logits, (), (), None)
    ours = HmilLoss(BRACS, preset)(output, BAGS, _targets(BRACS), 1, 10)
    assert set(ours.terms) == {"fine", "coarse", "hba"}
    weight = 0.99 if preset == "released" else 0.9
    hba = ours.terms["hba"] * (1 if preset == "released" else weight)
    expected = ours.terms["fine"] + weight * ours.terms["coarse"] + hba
    torch.testing.assert_close(ours.total.detach(), expected)


def test_state_dict_is_empty_and_device_follows() -> None:
    loss = HmilLoss(DEEP)
    assert not loss.state_dict()
    assert {b.device.type for b in loss.to("meta").buffers()} == {"meta"}


def test_bad_arguments_are_named() -> None:
    said = "there is no preset 'worst'\nFix: choose one of best, paper, released"
    with pytest.raises(UsageError, match=said):
        HmilLoss(BRACS, "worst")
    loss, output, targets = HmilLoss(BRACS), _output(BRACS), _targets(BRACS)
    with pytest.raises(ValueError, match=r"\(3,\) classes per level, the tree \(3, 7\)"):
        loss(_output(FLAT), BAGS, targets, 0, 10)
    with pytest.raises(ValueError, match=r"targets is torch.int64 \[4\]; give int64 \[4, 2\]"):
        loss(output, BAGS, targets[:, 1], 0, 10)
    with pytest.raises(ValueError, match="epochs is 0"):
        loss(output, BAGS, targets, 0, 0)
