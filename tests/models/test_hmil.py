from typing import Any

import pytest
import torch
from torch import Tensor

from hmil_fast.errors import UsageError
from hmil_fast.models import MODELS, build_model
from hmil_fast.models.hmil import HMIL

BAGS = torch.tensor([[0, 5], [5, 0], [5, 1], [8, 90]])
FULL = [0, 2, 3]
PARENTS = ((0, 0, 0, 1, 1, 2, 2),)
TREES = [(3,), (3, 7), (2, 4, 9), (2, 3, 5, 8)]


def _model(num_classes: tuple[int, ...], **options: Any) -> HMIL:
    torch.manual_seed(0)
    model = HMIL(20, num_classes, hidden=12, **options).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _features(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(100, 20, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize(("num_classes", "count"), [((3, 7), 1_348_172), ((2, 6), 1_347_850)])
def test_parameters_are_those_of_the_release(num_classes: tuple[int, ...], count: int) -> None:
    model = HMIL(1024, num_classes)
    assert sum(p.numel() for p in model.parameters()) == count
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    kaiming = (2 / 1024) ** 0.5
    assert model.reduce.weight.std().item() == pytest.approx(kaiming, rel=0.02)


@pytest.mark.parametrize("readout", ["paper", "evidence"])
@pytest.mark.parametrize("num_classes", TREES)
def test_fold_equals_the_published_formulas(num_classes: tuple[int, ...], readout: str) -> None:
    model, results = _model(num_classes, readout=readout), []
    for forward in (model.forward, model.forward_unfolded):
        x = _features().requires_grad_()
        out = forward(x, BAGS)
        tensors = [
            *out.logits, *out.attention_logits, *(lse[FULL] for lse in out.lse), out.embeddings
        ]  # fmt: skip
        generator = torch.Generator().manual_seed(2)
        loss = sum(
            (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in tensors
        )
        grads = torch.autograd.grad(loss, [x, *model.parameters()])
        assert all((lse[1] == -torch.inf).all() for lse in out.lse)
        results.append([*tensors, *grads])
    for ours, theirs in zip(*results, strict=True):
        scale = max(theirs.abs().max().item(), 1)
        assert (ours - theirs).abs().max().item() < 1e-12 * scale


def test_evidence_is_what_the_class_found_and_the_mean_of_the_bag() -> None:
    model, x = _model((2, 3), readout="evidence"), _features()[:6]
    out = model(x, torch.tensor([[0, 6]]))
    r = torch.relu(x @ model.reduce.weight.T + model.reduce.bias)
    level = model.levels[0]
    attention = (out.attention_logits[0] - out.lse[0]).exp()  # [6, 2]
    for c in range(2):
        found = attention[:, c] @ r
        evidence = out.attention_logits[0][:, c].exp().mean().log()
        logit = level.classify.weight[c] @ found + level.classify.bias[c] + level.scale * evidence
        logit = logit + level.average.weight[c] @ r.mean(0) + level.average.bias[c]
        torch.testing.assert_close(out.logits[0][0, c], logit)


def test_formulas_written_out_for_two_levels() -> None:
    """An independent reading of the paper's formulas, with the state dict's names."""
    model, x = _model((2, 3)), _features()[:6]
    p = {k: v.detach() for k, v in model.state_dict().items()}
    r = (x @ p["reduce.weight"].T + p["reduce.bias"]).clamp_min(0)
    h, out = r, model(x, torch.tensor([[0, 6]]))
    for l in range(2):
        w = {k.removeprefix(f"levels.{l}."): v for k, v in p.items() if f"levels.{l}." in k}
        h = h @ w["embed.weight"].T + w["embed.bias"]
        gate = torch.tanh(h @ w["V.weight"].T + w["V.bias"])
        gate = gate / (1 + torch.exp(-(h @ w["U.weight"].T + w["U.bias"])))
        scores = gate @ w["w.weight"].T + w["w.bias"]
        attention = scores.exp() / scores.exp().sum(0)
        pooled = attention.T @ h
        logits = pooled @ w["classify.weight"][0] + w["classify.bias"]
        torch.testing.assert_close(out.logits[l][0], logits, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            (out.attention_logits[l] - out.lse[l]).exp(), attention, rtol=1e-12, atol=1e-12
        )
    expected = pooled / pooled.norm(dim=1, keepdim=True)
    torch.testing.assert_close(out.embeddings[0], expected, rtol=1e-12, atol=1e-12)


def test_shapes() -> None:
    out = _model((2, 4, 9))(_features(), BAGS)
    assert [list(t.shape) for t in out.logits] == [[4, 2], [4, 4], [4, 9]]
    assert [list(t.shape) for t in out.attention_logits] == [[100, 2], [100, 4], [100, 9]]
    assert [list(t.shape) for t in out.lse] == [[4, 2], [4, 4], [4, 9]]
    assert list(out.embeddings.shape) == [4, 9, 12]


@pytest.mark.parametrize("form", ["forward", "forward_unfolded"])
def test_empty_bags_and_zero_features_stay_finite(form: str) -> None:
    model = HMIL(20, (3, 7), hidden=12)
    x = torch.zeros(100, 20)
    out = getattr(model, form)(x, BAGS)
    assert (out.embeddings == 0).all()
    assert all((level == 0).all() for level in out.logits)
    (
        sum(level.square().sum() + level.sum() for level in out.logits) + out.embeddings.sum()
    ).backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e3 for p in model.parameters())


def test_bag_alone_is_the_bag_packed() -> None:
    model, x = _model((3, 7)), _features()
    packed, alone = model(x, BAGS), model(x[8:98], torch.tensor([[0, 90]]))
    for a, b in zip(packed.logits, alone.logits, strict=True):
        torch.testing.assert_close(a[3], b[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_bag_of_nans_touches_no_other_bag(name: str) -> None:
    torch.manual_seed(0)
    model, x = build_model(name, 20, (3, 7), PARENTS, hidden=12), _features(torch.float32)
    clean = model(x, BAGS)
    x[8:98] = torch.nan
    dirty = model(x, BAGS)
    for a, b in zip(clean.logits, dirty.logits, strict=True):
        assert torch.equal(a[:3], b[:3])
        assert b[3].isnan().all()


@pytest.mark.parametrize("name", MODELS)
def test_autocast_and_half_features_give_float32(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 20, (3, 7), PARENTS, hidden=12)
    x = _features(torch.float32)
    exact = model(x, BAGS)
    half = model(x.half(), BAGS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(x, BAGS)
    for out in (half, cast):
        for a, b in zip(exact.logits, out.logits, strict=True):
            assert b.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_dropout_acts_in_training_only() -> None:
    model, x = _model((3, 7), dropout=0.5), _features()
    torch.manual_seed(0)
    first, second = model(x, BAGS), model(x, BAGS)
    assert not torch.equal(first.logits[1], second.logits[1])
    model.eval()
    assert torch.equal(model(x, BAGS).logits[1], model(x, BAGS).logits[1])


def test_unknown_model_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no model 'hmli'\nFix: choose one of hmil, flat"):
        build_model("hmli", 20, (3, 7))


@pytest.mark.parametrize("name", MODELS)
def test_bad_arguments_are_named(name: str) -> None:
    with pytest.raises(ValueError, match="num_classes \\(\\)"):
        build_model(name, 20, ())
    with pytest.raises(ValueError, match=r"x has shape \[5, 21\]; give \[N, 20\]"):
        build_model(name, 20, (3, 7), PARENTS)(torch.zeros(5, 21), torch.tensor([[0, 5]]))
    with pytest.raises(ValueError, match=r"bags\[0\] = \(0, 6\) leaves the 5 rows"):
        build_model(name, 20, (3, 7), PARENTS)(torch.zeros(5, 20), torch.tensor([[0, 6]]))


@pytest.mark.parametrize("num_classes", [(3,), (2, 4, 9)])
def test_the_whole_model_is_one_graph(num_classes: tuple[int, ...]) -> None:
    model, x = _model(num_classes, readout="evidence"), _features()
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        output = forward(x, BAGS)
        loss = sum(level.sin().sum() for level in (*output.logits, *output.attention_logits))
        results.append([*output.logits, *torch.autograd.grad(loss, list(model.parameters()))])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-11, atol=1e-11)
