"""Every other loss of the menu against plain Python, on an uneven tree with a single child."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree
from hmil_fast.losses import PRESETS, HmilLoss

BRACS = LabelTree.from_nested({"b": ["N", "PB", "UDH"], "a": ["FEA", "ADH"], "m": ["DCIS", "IC"]})
LEAVES = [0, 1, 2, 2, 4, 3, 1]

# of n, micro, large, small, end, by hand: nodes from the top, edges from the root to them, and
# heights of common ancestors
PATHS = [["n"], ["p", "micro"], ["p", "macro", "large"], ["p", "macro", "small"],
         ["p", "only", "end"]]  # fmt: skip
DEPTH = {"n": 1, "p": 1, "micro": 2, "macro": 2, "only": 2, "large": 3, "small": 3, "end": 3}
COMMON = [[0, 3, 3, 3, 3], [3, 0, 2, 2, 2], [3, 2, 0, 1, 2], [3, 2, 1, 0, 2], [3, 2, 2, 2, 0]]
LEVELS = [["n", "p", "p", "p", "p"], ["n", "micro", "macro", "macro", "only"],
          ["n", "micro", "large", "small", "end"]]  # fmt: skip


def _settings(**changes: Any) -> Any:
    """Nothing but the term that is asked for."""
    bare = replace(
        PRESETS["paper"], curriculum="constant", coarse_weight=0, hba="none", ham="none",
        supcon="none",
    )  # fmt: skip
    return replace(bare, **changes)


def _softmax(row: Tensor) -> list[float]:
    e = [math.exp(value) for value in row.tolist()]
    return [value / sum(e) for value in e]


def _marginal(p: list[float], leaf: int) -> float:
    nll = [
        -math.log(sum(q for q, name in zip(p, names, strict=True) if name == names[leaf]))
        for names in LEVELS
    ]
    return sum(nll) / 3


def _hxe(p: list[float], leaf: int, alpha: float) -> float:
    above, loss = 1.0, 0.0
    for name in PATHS[leaf]:
        node = sum(q for q, path in zip(p, PATHS, strict=True) if name in path)
        loss -= math.exp(-alpha * DEPTH[name]) * math.log(node / above)
        above = node
    return loss


def _soft(p: list[float], leaf: int, beta: float) -> float:
    share = [math.exp(-beta * height / 3) for height in COMMON[leaf]]
    return -sum(s / sum(share) * math.log(q) for s, q in zip(share, p, strict=True))


LOSSES: dict[str, tuple[dict[str, Any], Callable[[list[float], int], float]]] = {
    "ce": ({}, lambda p, leaf: -math.log(p[leaf])),
    "marginal": ({}, _marginal),
    "hxe": ({"hxe_alpha": 0.5}, lambda p, leaf: _hxe(p, leaf, 0.5)),
    "soft": ({"soft_beta": 4.0}, lambda p, leaf: _soft(p, leaf, 4.0)),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_hierarchy_losses(
    kind: str, smoothing: float, class_weights: str, uneven: LabelTree, batch: Any
) -> None:
    changes, formula = LOSSES[kind]
    output, bags, targets = batch(LEAVES)
    settings = _settings(
        hierarchy=kind, label_smoothing=smoothing, class_weights=class_weights, **changes
    )
    counts = [40, 5, 3, 0, 2]  # of 50 slides, in four leaves that have any
    weight = [50 / 4 / 40, 50 / 4 / 5, 50 / 4 / 3, 0.0, 50 / 4 / 2]
    expected = []
    for row, leaf in zip(output.logits[-1], LEAVES, strict=True):
        p = _softmax(row)
        even = -sum(math.log(q) for q in p) / 5
        loss = (1 - smoothing) * formula(p, leaf) + smoothing * even
        expected.append(loss * (weight[leaf] if class_weights == "balanced" else 1))
    ours = HmilLoss(uneven, settings, counts)(output, bags, targets, 0, 1)
    name = "fine" if kind == "ce" else kind
    assert set(ours.terms) == {name, "coarse"}
    assert ours.terms[name].item() == pytest.approx(sum(expected) / 7, rel=1e-12)
    assert ours.total.item() == pytest.approx(sum(expected) / 7, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: (
            HmilLoss(uneven, settings, counts)(
                output._replace(logits=(*output.logits[:-1], x)), bags, targets, 0, 1
            ).total
        ),
        output.logits[-1],
    )


@pytest.mark.parametrize("kind", ["hxe", "soft"])
def test_at_their_ends_hxe_and_soft_are_cross_entropy(
    kind: str, uneven: LabelTree, batch: Any
) -> None:
    output, bags, targets = batch(LEAVES)
    losses = [
        HmilLoss(uneven, _settings(hierarchy=h, hxe_alpha=0.0, soft_beta=1e9)) for h in (kind, "ce")
    ]
    a, b = (loss(output, bags, targets, 0, 1).total for loss in losses)
    torch.testing.assert_close(a, b)


def test_hxe_blames_a_mistake_far_off_in_the_tree_more(uneven: LabelTree, batch: Any) -> None:
    """The larger α, the more: what the loss is for (Bertinetto et al.)."""
    output, bags, targets = batch([2])  # large
    ratio = []
    for alpha in (0.0, 0.5, 2.0):
        loss = HmilLoss(uneven, _settings(hierarchy="hxe", hxe_alpha=alpha))
        value = []
        for wrong in (0, 3):  # n, small
            said = output._replace(logits=(*output.logits[:-1], 9.0 * torch.eye(5)[[wrong]]))
            value.append(loss(said, bags, targets, 0, 1).total.item())
        ratio.append(value[0] / value[1])
    assert ratio[0] == pytest.approx(1)
    assert 1.1 < ratio[1] < ratio[2]


@pytest.mark.parametrize("kind", LOSSES)
def test_certainty_of_the_wrong_leaf_keeps_loss_and_gradient_finite(
    kind: str, uneven: LabelTree, batch: Any
) -> None:
    output, bags, targets = batch([4])
    logits = torch.tensor([[500.0, 0, 0, 0, 0]], requires_grad=True)
    sure = output._replace(logits=(*output.logits[:-1], logits))
    loss = HmilLoss(uneven, _settings(hierarchy=kind))(sure, bags, targets, 0, 1).total
    loss.backward()
    assert 10 < loss.item() < 1000
    assert logits.grad.isfinite().all()


def test_smoothing_reaches_the_heads(uneven: LabelTree, batch: Any) -> None:
    output, bags, targets = batch(LEAVES)
    settings = _settings(label_smoothing=0.2, coarse_weight=3)
    ours = HmilLoss(uneven, settings)(output, bags, targets, 0, 1)
    levels = []
    for l in range(2):
        bagwise = []
        for row, node in zip(output.logits[l], targets[:, l].tolist(), strict=True):
            log_p = [math.log(q) for q in _softmax(row)]
            bagwise.append(-0.8 * log_p[node] - 0.2 * sum(log_p) / len(log_p))
        levels.append(sum(bagwise) / 7)
    assert ours.terms["coarse"].item() == pytest.approx(sum(levels) / 2, rel=1e-12)
    expected = ours.terms["fine"] + 3 * ours.terms["coarse"]
    torch.testing.assert_close(ours.total.detach(), expected)


def test_averaged_children_let_even_attention_reach_zero(batch: Any) -> None:
    output, bags, targets = batch([0, 1, 5], tree=BRACS)
    even = tuple(torch.zeros_like(a) for a in output.attention_logits)
    lse = tuple(bags[:, 1:].double().log().expand(-1, k).clone() for k in BRACS.num_classes)
    output = output._replace(attention_logits=even, lse=lse)
    value = {}
    for form in ("sum", "mean"):
        settings = _settings(ham=form, ham_weight=1.0)
        value[form] = HmilLoss(BRACS, settings)(output, bags, targets, 0, 1).terms["ham"].item()
    # cosine of (1, 1, 1) with the numbers of children (3, 2, 2)
    assert value["sum"] == pytest.approx(1 - 7 / math.sqrt(3 * 17), abs=1e-12)
    assert value["mean"] == pytest.approx(0, abs=1e-15)


def _supcon(z: Tensor, y: list[object], tau: float) -> float:
    anchors = []
    for i, row in enumerate(z):
        s = (z @ row / tau).tolist()
        log_sum = math.log(sum(math.exp(s[a]) for a in range(len(y)) if a != i))
        log_p = [s[p] - log_sum for p in range(len(y)) if p != i and y[p] == y[i]]
        if log_p:
            anchors.append(-sum(log_p) / len(log_p))
    return sum(anchors) / len(anchors)


def test_supcon_of_every_level(uneven: LabelTree, batch: Any) -> None:
    output, bags, targets = batch(LEAVES)
    z = output.embeddings.detach().flatten(0, 1)
    level = [
        _supcon(z, [names[leaf] for leaf in LEAVES for _ in range(5)], 0.2) for names in LEVELS
    ]
    weights = [math.exp(1 / 3), math.exp(1 / 2), math.exp(1)]  # coarse to fine
    expected = sum(w * loss for w, loss in zip(weights, level, strict=True)) / sum(weights)
    settings = _settings(supcon="levels", supcon_weight=0.5, tau=0.2)
    ours = HmilLoss(uneven, settings)(output, bags, targets, 0, 1)
    assert ours.terms["supcon"].item() == pytest.approx(expected, rel=1e-10)
    total = ours.terms["fine"] + 0.5 * ours.terms["supcon"]
    torch.testing.assert_close(ours.total.detach(), total)
    leaf = HmilLoss(uneven, replace(settings, supcon="leaf"))(output, bags, targets, 0, 1)
    assert leaf.terms["supcon"].item() == pytest.approx(level[-1], rel=1e-10)


class WithOwnLoss(NamedTuple):
    logits: tuple[Tensor, ...]
    attention_logits: tuple[Tensor, ...]
    lse: tuple[Tensor, ...]
    embeddings: Tensor | None
    auxiliary: Tensor | None


@pytest.mark.parametrize("preset", PRESETS)
def test_a_models_own_loss_is_added_as_it_is(preset: str, uneven: LabelTree, batch: Any) -> None:
    output, bags, targets = batch(LEAVES)
    loss = HmilLoss(uneven, preset, [1] * 5).eval()
    without = loss(output, bags, targets, 4, 10)
    none = loss(WithOwnLoss(*output, None), bags, targets, 4, 10)
    assert none.terms.keys() == without.terms.keys()
    assert torch.equal(none.total, without.total)
    own = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    ours = loss(WithOwnLoss(*output, own), bags, targets, 4, 10)
    assert ours.terms["auxiliary"].item() == 0.75
    assert ours.total.item() == pytest.approx(without.total.item() + 0.75, rel=1e-12)
    ours.total.backward()
    assert own.grad.item() == 1


def test_best_is_what_the_table_says(uneven: LabelTree, batch: Any) -> None:
    output, bags, targets = batch(LEAVES)
    settings = PRESETS["best"]
    ours = HmilLoss(uneven, settings, [1] * 5)(output, bags, targets, 3, 10)
    assert (settings.hierarchy, settings.coarse, settings.curriculum) == (
        "marginal", "sum", "constant"
    )  # fmt: skip
    weights = {
        "marginal": 1, "coarse": settings.coarse_weight, "hba": settings.hba_weight,
        "ham": settings.ham_weight, "supcon": settings.supcon_weight,
    }  # fmt: skip
    expected = sum(weights[name] * term.item() for name, term in ours.terms.items())
    assert ours.total.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("counts", [None, [1, 2, 3]])
def test_balanced_weights_want_a_count_per_leaf(
    counts: list[int] | None, uneven: LabelTree
) -> None:
    with pytest.raises(ValueError, match="give the training slides of 5 leaves"):
        HmilLoss(uneven, _settings(class_weights="balanced"), counts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hierarchy": "flat"}, "hierarchy is 'flat'\nFix: choose one of ce, marginal, hxe, soft"),
        ({"coarse": "mean"}, "coarse is 'mean'\nFix: choose one of head, sum"),
        ({"hxe_alpha": -0.1}, "hxe_alpha is -0.1"),
        ({"soft_beta": 0.0}, "soft_beta is 0.0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"supcon_weight": math.inf}, "supcon_weight is inf"),
        ({"coarse_weight": math.nan}, "coarse_weight is nan"),
        ({"tau": 0.0}, "tau is 0.0"),
        ({"supcon_memory": -1}, "supcon_memory is -1"),
        ({"supcon": "released", "supcon_memory": 4}, "give 0 with supcon=released"),
    ],
)
def test_impossible_settings_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(PRESETS["paper"], **change)
