"""Every model against its formulas, written bag by bag, and against itself on other packings."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmil_fast.models import MODELS, build_model
from hmil_fast.models.output import HmilOutput, summed_logits
from hmil_fast.models.segments import segments

TREE = ((2, 4, 6), ((0, 0, 1, 1), (0, 0, 1, 2, 2, 3)))  # single-child chains among them
SIZES, PARENTS = TREE
BAGS = torch.tensor([[0, 5], [7, 0], [7, 1], [300, 290], [10, 33], [60, 200]])
TARGETS = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 2, 3], [1, 3, 5], [0, 1, 2], [0, 0, 0]])
FULL = [0, 2, 3, 4, 5]
ATTENDING = [name for name in MODELS if name not in ("mean", "max")]


def made(name: str, **options: float) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(name, 20, SIZES, PARENTS, hidden=12, **options).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def rows(count: int = 600) -> Tensor:
    return torch.randn(count, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def loss(output: HmilOutput) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros((), dtype=torch.float64)
    for level in output.logits:
        weight = torch.randn(level.shape[1], generator=generator, dtype=torch.float64)
        total = total + (level * weight).sum()
    return total


@pytest.mark.parametrize("name", MODELS)
def test_a_bag_is_the_same_alone_packed_padded_and_in_any_order(name: str) -> None:
    model, x = made(name), rows()
    packed = model(x, BAGS)
    grads = torch.autograd.grad(loss(packed), list(model.parameters()), allow_unused=True)
    order = torch.tensor([4, 0, 5, 2, 3, 1])
    turned = model(x, BAGS[order])
    padded = torch.full((6, 300, 20), torch.nan, dtype=torch.float64)
    alone, summed_grads = [], [torch.zeros_like(p) for p in model.parameters()]
    for b, (start, length) in enumerate(BAGS.tolist()):
        padded[b, :length] = x[start : start + length]
        alone.append(model(x[start : start + length], torch.tensor([[0, length]])))
        own = torch.autograd.grad(loss(alone[-1]), list(model.parameters()), allow_unused=True)
        for total, grad in zip(summed_grads, own, strict=True):
            total.add_(0 if grad is None else grad)
    bags = torch.stack([torch.arange(6) * 300, BAGS[:, 1]], 1)
    filled = model(padded.flatten(0, 1), bags)
    for l in range(3):
        near(turned.logits[l], packed.logits[l][order])
        near(filled.logits[l], packed.logits[l])
        near(torch.cat([out.logits[l] for out in alone]), packed.logits[l])
    for grad, total in zip(grads, summed_grads, strict=True):
        near(torch.zeros_like(total) if grad is None else grad, total)


@pytest.mark.parametrize("name", MODELS)
def test_empty_bags_and_no_rows_are_defined(name: str) -> None:
    model = made(name)
    nothing = model(rows(0), torch.tensor([[0, 0], [0, 0]]), TARGETS[:2])
    packed = model(rows(), BAGS, TARGETS)
    for level, beside in zip(nothing.logits, packed.logits, strict=True):
        assert level.isfinite().all()
        near(level[0], beside[1])
    (loss(nothing) + loss(packed)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert [list(level.shape) for level in model(rows(0), BAGS[:0], TARGETS[:0]).logits] == [
        [0, 2],
        [0, 4],
        [0, 6],
    ]
    assert [len(level) for level in model(rows(), BAGS[:0], TARGETS[:0]).logits] == [0, 0, 0]
    model.eval()
    without = model(rows(0), BAGS[:0])
    assert all(len(level) == 0 for level in (*without.attention_logits, *without.lse))


@pytest.mark.parametrize("name", MODELS)
def test_nans_in_the_first_rows_stay_in_their_bag(name: str) -> None:
    model, x = made(name), rows()
    clean = model(x, BAGS).logits
    x[:5] = torch.nan
    for a, b in zip(clean, model(x, BAGS).logits, strict=True):
        assert b[0].isnan().all()
        assert torch.equal(a[1:], b[1:])


@pytest.mark.parametrize("name", ATTENDING)
def test_attention_of_every_node_sums_to_one(name: str) -> None:
    model, x = made(name).eval(), rows()
    out = model(x, BAGS)
    for scores, lse, size in zip(out.attention_logits, out.lse, SIZES, strict=True):
        assert scores.shape == (600, size)
        assert (lse[1] == -torch.inf).all()
        for b in FULL:
            start, length = BAGS[b].tolist()
            attention = (scores[start : start + length] - lse[b]).exp()
            near(attention.sum(0), torch.ones(size, dtype=torch.float64))


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("hmil", "flat")])
def test_baselines_leave_nothing_to_align_or_contrast(name: str) -> None:
    out = made(name)(rows(), BAGS, TARGETS)
    assert (out.attention_logits, out.lse, out.embeddings) == ((), (), None)
    assert (out.auxiliary is not None) == (name == "clam")


def test_max_is_the_largest_of_every_hidden_unit() -> None:
    model, x = made("max"), rows()
    out = model(x, BAGS)
    for b in FULL:
        start, length = BAGS[b].tolist()
        hidden = F.relu(model.first(x[start : start + length])).max(0).values
        near(out.logits[1][b], model.heads[1](hidden))
    near(out.logits[1][1], model.heads[1].bias)


def test_mean_is_a_perceptron_on_the_mean() -> None:
    model, x = made("mean"), rows()
    out = model(x, BAGS)
    for b in FULL:
        start, length = BAGS[b].tolist()
        hidden = F.relu(model.first(x[start : start + length].mean(0)))
        near(out.logits[2][b], model.heads[2](hidden))
    near(out.logits[2][1], model.heads[2](F.relu(model.first.bias)))


def gated(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """h [n, 12] and its attentions [n, C], as Ilse et al. write them."""
    part = model.attention
    h = F.relu(x @ part.embed.weight.T + part.embed.bias)
    gate = torch.tanh(h @ part.V.weight.T + part.V.bias)
    gate = gate / (1 + torch.exp(-(h @ part.U.weight.T + part.U.bias)))
    scores = gate @ part.w.weight.T + part.w.bias
    return h, scores.exp() / scores.exp().sum(0)


def test_abmil_is_one_gated_attention() -> None:
    model, x = made("abmil").eval(), rows()
    out = model(x, BAGS)
    for b in FULL:
        start, length = BAGS[b].tolist()
        h, attention = gated(model, x[start : start + length])
        pooled = (attention * h).sum(0)
        for l, size in enumerate(SIZES):
            near(out.logits[l][b], model.heads[l].weight @ pooled + model.heads[l].bias)
            found = (out.attention_logits[l][start : start + length] - out.lse[l][b]).exp()
            near(found, attention.expand(-1, size))


def test_clam_is_an_attention_and_a_classifier_per_node() -> None:
    model, x = made("clam").eval(), rows()
    out = model(x, BAGS, TARGETS)
    assert out.auxiliary is None
    for b in FULL:
        start, length = BAGS[b].tolist()
        h, attention = gated(model, x[start : start + length])
        logits = [
            model.classify.weight[c] @ (attention[:, c] @ h) + model.classify.bias[c]
            for c in range(12)
        ]
        near(torch.cat([level[b] for level in out.logits]), torch.stack(logits))


def test_clam_sorts_the_ends_of_every_attention() -> None:
    model, x = made("clam"), rows()
    auxiliary = model(x, BAGS, TARGETS).auxiliary
    bag_losses = []
    for b, (start, length) in enumerate(BAGS.tolist()):
        k = min(8, length // 2)
        if not k:
            continue
        h, attention = gated(model, x[start : start + length])
        level_losses, c = [], 0
        for l, size in enumerate(SIZES):
            branches = []
            for node in range(size):
                sort = h @ model.sort.weight[2 * c : 2 * c + 2].T
                sort = sort + model.sort.bias[2 * c : 2 * c + 2]
                top = attention[:, c].topk(k).indices
                if node == TARGETS[b, l]:
                    bottom = attention[:, c].topk(k, largest=False).indices
                    y = torch.tensor([1] * k + [0] * k)
                    branches.append(F.cross_entropy(sort[torch.cat([top, bottom])], y))
                else:
                    y = torch.zeros(k, dtype=torch.int64)
                    branches.append(F.cross_entropy(sort[top], y))
                c += 1
            level_losses.append(torch.stack(branches).mean())
        bag_losses.append(torch.stack(level_losses).mean())
    expected = 0.3 / 0.7 * torch.stack(bag_losses).sum() / len(BAGS)  # 0 of a bag without two
    near(auxiliary, expected)
    ours = torch.autograd.grad(auxiliary, [model.sort.weight, model.attention.embed.weight])
    theirs = torch.autograd.grad(expected, [model.sort.weight, model.attention.embed.weight])
    for a, e in zip(ours, theirs, strict=True):
        near(a, e)


def test_clam_has_nothing_to_sort_in_bags_of_one() -> None:
    model = made("clam")
    bags = torch.tensor([[0, 1], [1, 1], [2, 0]])
    auxiliary = model(rows(2), bags, TARGETS[:3]).auxiliary
    assert auxiliary == 0
    auxiliary.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_dsmil_is_the_mean_of_both_streams() -> None:
    model, x = made("dsmil").eval(), rows()
    out = model(x, BAGS)
    for b in FULL:
        start, length = BAGS[b].tolist()
        h = F.relu(model.embed(x[start : start + length]))
        scores, queries, values = model.score(h), model.query(h), model.value(h)
        pooled, maps = [], []
        for c in range(12):
            critical = scores[:, c].argmax()
            likeness = queries @ queries[critical] / 128**0.5
            maps.append(likeness.softmax(0))
            pooled.append(maps[-1] @ values)
        at = 0
        for l, size in enumerate(SIZES):
            own = slice(at, at + size)
            bag = model.heads[l](torch.cat(pooled[own]))
            near(out.logits[l][b], (scores[:, own].max(0).values + bag) / 2)
            found = (out.attention_logits[l][start : start + length] - out.lse[l][b]).exp()
            near(found, torch.stack(maps[own], 1))
            at += size


def test_flat_sums_its_leaves() -> None:
    model, x = made("flat").eval(), rows()
    out, leaves = model(x, BAGS), model.leaves(x, BAGS)
    p = leaves.logits[0].softmax(1)
    a = (leaves.attention_logits[0][300:590] - leaves.lse[0][3]).exp()
    near(out.logits[2].softmax(1), p)
    middle = torch.stack([p[:, 0] + p[:, 1], p[:, 2], p[:, 3] + p[:, 4], p[:, 5]], 1)
    near(out.logits[1].softmax(1), middle)
    near(out.logits[0].softmax(1), torch.stack([p[:, :3].sum(1), p[:, 3:].sum(1)], 1))
    mean = torch.stack([a[:, :3].mean(1), a[:, 3:].mean(1)], 1)
    near((out.attention_logits[0][300:590] - out.lse[0][3]).exp(), mean)
    assert torch.equal(out.embeddings, leaves.embeddings)


def test_flat_refuses_parents_of_another_tree() -> None:
    for parents in ((), ((0, 0, 0, 0), PARENTS[1]), (PARENTS[1], PARENTS[0])):
        with pytest.raises(ValueError, match="give those of the label tree"):
            build_model("flat", 20, SIZES, parents)


@pytest.mark.parametrize("kind", [tuple, torch.tensor])
def test_summed_logits_hold_where_probabilities_vanish(kind: type) -> None:
    leaf = torch.tensor([[0.0, 1, -2000, -2000, 3, 2]], dtype=torch.float64, requires_grad=True)
    parents = [kind(parent) for parent in PARENTS]
    levels = summed_logits(leaf, parents)
    p = leaf.softmax(1)[0]
    near(levels[0][0].exp(), torch.stack([p[:3].sum(), p[3:].sum()]))
    assert levels[1][0, 1] < -1900
    torch.cat(levels, 1).sum().backward()
    assert leaf.grad.isfinite().all()
    assert [len(level[0]) for level in levels] == [2, 4, 6]
    near(summed_logits(leaf, ())[0], leaf.log_softmax(1))


@pytest.mark.parametrize("name", [n for n in ATTENDING if n != "dsmil"])
def test_dropout_acts_while_training_only(name: str) -> None:
    model, x = made(name, dropout=0.5), rows()
    assert not torch.equal(model(x, BAGS).logits[2], model(x, BAGS).logits[2])
    model.eval()
    assert torch.equal(model(x, BAGS).logits[2], model(x, BAGS).logits[2])


@pytest.mark.parametrize("name", ["mean", "max", "clam", "dsmil", "flat"])
def test_bags_that_overlap_are_refused_where_rows_need_one_bag(name: str) -> None:
    model = made(name) if name == "clam" else made(name).eval()
    with pytest.raises(ValueError, match="the bags that begin at rows 0 and 4 overlap"):
        model(rows(9), torch.tensor([[4, 5], [2, 0], [0, 5]]), TARGETS[:3])


def test_order_goes_bag_by_bag_from_the_largest_down() -> None:
    scores = torch.tensor([[1.0], [3], [2], [9], [torch.nan], [5]])
    parts = segments(torch.tensor([[4, 2], [2, 0], [0, 3]]), 6, scores.device)
    assert parts.order(scores)[:, 0].tolist() == [4, 5, 1, 2, 0, 3]
    assert parts.argmax(scores)[:, 0].tolist() == [4, 0, 1]
    assert parts.bag.tolist() == [2, 2, 2, 3, 0, 0]


@pytest.mark.parametrize("length", [0, 1, 127, 128, 129, 400])
def test_tiles_hold_every_row_once(length: int) -> None:
    bags = torch.tensor([[length + 50, 130], [0, length], [length + 5, 0], [length, 45]])
    held, inside, bag = segments(bags, length + 200, bags.device).tiles()
    assert inside.shape == held.shape
    assert len(held) <= (length + 200) / 128 + 4
    for b, (start, count) in enumerate(bags.tolist()):
        assert sorted(held[bag == b][inside[bag == b]].tolist()) == [*range(start, start + count)]
    assert not inside[bag == 4].any()
