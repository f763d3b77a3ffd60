from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hmil_fast.kernels.bags import check_bags
from hmil_fast.kernels.gated_attention_pool import gated_attention_pool, streaming
from hmil_fast.kernels.gated_attention_pool.reference import pool_reference

D, H, C = 12, 10, 3
BAGS = [[0, 1], [7, 0], [1, 2], [5, 40], [60, 9]]  # rows 3, 4 and 45 to 59 are in no bag
# with tiles of 16 rows: 3, 4, 1 and 2, 2 share tiles, 40 and 9 have their own
MIXED = [[0, 3], [3, 4], [7, 1], [8, 40], [48, 2], [50, 2], [52, 0], [52, 9]]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_TILE", 16)


def _operands(rows: int = 70, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, D), (H, D), (H,), (H, D), (H,), (C, H), (C,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def _bags(pairs: list[list[int]]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def _by_hand(operands: list[Tensor], pairs: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """The formula with sums written out, independent of the code under test."""
    x, V, bv, U, bu, Wc, bc = operands
    pooled, lse = x.new_zeros(len(pairs), C, D), x.new_full((len(pairs), C), -torch.inf)
    logits = x.new_zeros(len(x), C)
    for b, (start, length) in enumerate(pairs):
        for c in range(C):
            total, weighted = 0.0, x.new_zeros(D)
            for i in range(start, start + length):
                gate = torch.tanh(V @ x[i] + bv) / (1 + torch.exp(-(U @ x[i] + bu)))
                logits[i, c] = Wc[c] @ gate + bc[c]
                total += logits[i, c].exp()
                weighted = weighted + logits[i, c].exp() * x[i]
            if length:
                pooled[b, c], lse[b, c] = weighted / total, total.log()
    return pooled, lse, logits


def test_equals_the_formula_written_out() -> None:
    operands = _operands()
    for ours, theirs in zip(
        gated_attention_pool(*operands, _bags(BAGS)), _by_hand(operands, BAGS), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep", [0, 1 << 30], ids=["recomputed gates", "kept gates"])
@pytest.mark.parametrize(
    "pairs",
    [BAGS, MIXED, [[5, 40], [30, 30], [0, 6]], [[0, 2], [2, 3], [2, 4], [6, 1]], [[3, 0]], []],
)
def test_gradients_equal_autograd_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, pairs: list[list[int]], keep: int
) -> None:
    monkeypatch.setattr(streaming, "_KEEP_BYTES", keep)
    operands = [t.requires_grad_() for t in _operands()]
    full = torch.tensor([length > 0 for _, length in pairs], dtype=torch.bool)
    results = []
    for op in (
        lambda: gated_attention_pool(*operands, _bags(pairs)),
        lambda: pool_reference(operands[0], operands[1:], check_bags(_bags(pairs), 70)),
    ):
        pooled, lse, logits = op()
        generator = torch.Generator().manual_seed(1)
        loss = sum(
            (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum()
            for t in (pooled, lse[full], logits)
        )
        grads = torch.autograd.grad(loss, operands, allow_unused=True, materialize_grads=True)
        results.append([pooled, lse, logits, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("keep", [0, 1 << 30], ids=["recomputed", "kept"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen x", "x with gradient"])
def test_reduced_rows_equal_the_layer_before(
    monkeypatch: pytest.MonkeyPatch, frozen: bool, keep: int
) -> None:
    monkeypatch.setattr(streaming, "_KEEP_BYTES", keep)
    generator = torch.Generator().manual_seed(2)
    x, W1, b1 = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in [(70, 7), (D, 7), (D,)]
    )
    operands = [x, W1, b1, *_operands()[1:]]
    trained = [t.requires_grad_() for t in operands[frozen:]]
    results = []
    for form in ("reduced", "layer before"):
        if form == "reduced":
            out = gated_attention_pool(x, *operands[3:], _bags(MIXED), reduce=(W1, b1))
        else:
            rows = torch.relu(x @ W1.T + b1)
            out = pool_reference(rows, operands[3:], check_bags(_bags(MIXED), 70))
        loss = out[0].sin().sum() + out[1][torch.tensor(MIXED)[:, 1] > 0].sum() + out[2].sin().sum()
        results.append([*out, *torch.autograd.grad(loss, trained)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_products_in_bfloat16_stay_within_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies bfloat16; x, as from the cache, in float16."""
    monkeypatch.setattr(streaming, "computes_in_bf16", lambda device: True)
    x, *weights = _operands(dtype=torch.float32)
    weights = [0.3 * t for t in weights]
    reduce = (0.3 * torch.randn(D, D), torch.randn(D))
    trained = [t.requires_grad_() for t in (*reduce, *weights)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = gated_attention_pool(x.half(), *weights, _bags(MIXED), reduce=reduce)
        assert all(t.dtype == torch.float32 for t in out)
        loss = out[0].square().sum() + out[2].square().sum()
        results.append([*out, *torch.autograd.grad(loss, trained)])
    assert not torch.equal(results[0][0], results[1][0])
    for exact, rough in zip(*results, strict=True):
        good = exact.isfinite()  # the lse of an empty bag is not
        error = (exact - rough)[good].square().mean().sqrt() / exact[good].square().mean().sqrt()
        assert error < 0.02


def test_gradcheck_with_respect_to_everything() -> None:
    operands = [t.requires_grad_() for t in _operands(20)]
    bags = _bags([[0, 1], [3, 17], [2, 0]])

    def op(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled, lse, logits = gated_attention_pool(*inputs, bags)
        return pooled, lse[:2], logits

    assert torch.autograd.gradcheck(op, operands, fast_mode=True)


def test_only_what_is_trained_gets_a_gradient() -> None:
    operands = _operands()
    operands[1].requires_grad_()
    gated_attention_pool(*operands, _bags(BAGS))[0].sum().backward()
    assert operands[1].grad is not None
    assert all(t.grad is None for k, t in enumerate(operands) if k != 1)


def test_empty_bag_is_finite_and_gives_no_gradient() -> None:
    operands = [t.requires_grad_() for t in _operands()]
    pooled, lse, _ = gated_attention_pool(*operands, _bags([[4, 0], [0, 3]]))
    assert (pooled[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    (pooled[0].sum() + lse[0].sum()).backward()
    assert all((t.grad == 0).all() for t in operands)


def test_bag_of_one_is_its_instance() -> None:
    x, *weights = _operands(dtype=torch.float32)
    pooled, lse, logits = gated_attention_pool(x, *weights, _bags([[8, 1]]))
    assert torch.equal(pooled[0], x[8].expand(C, D))
    assert torch.equal(lse[0], logits[8])


def test_rows_outside_every_bag_do_not_count() -> None:
    operands = _operands()
    operands[0][3:5] = torch.nan
    operands = [t.requires_grad_() for t in operands]
    pooled, _, logits = gated_attention_pool(*operands, _bags(BAGS))
    assert (logits[3:5] == 0).all()
    (pooled.sum() + logits.sum()).backward()
    assert all(t.grad.isfinite().all() for t in operands)
    assert (operands[0].grad[3:5] == 0).all()


@pytest.mark.parametrize("order", [[6, 0, 3, 7, 5, 1, 4, 2], [*range(8)]], ids=["mixed", "run"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_alone_packed_and_elsewhere_are_equal(dtype: torch.dtype, order: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = [t.to(dtype) for t in _operands(seed=4)[1:]]
    weights[0] = torch.randn(H, 32, generator=generator).to(dtype)
    weights[2] = torch.randn(H, 32, generator=generator).to(dtype)
    lengths = [1, 2, 7, 16, 17, 0, 63, 130]
    parts = [torch.randn(n, 32, generator=generator).to(dtype) for n in lengths]
    start, pairs = 16, {}
    cache = [torch.randn(16, 32, generator=generator).to(dtype)]
    for k in order:
        pairs[k] = [start, lengths[k]]
        cache.append(parts[k])
        start += lengths[k]
    packed = gated_attention_pool(
        torch.cat(cache), *weights, _bags([pairs[k] for k in range(len(lengths))])
    )
    small = 1e-14 if dtype == torch.float64 else 4e-6
    for k, part in enumerate(parts):
        alone = gated_attention_pool(part, *weights, _bags([[0, len(part)]]))
        lo, n = pairs[k]
        for a, b in zip(
            (alone[0][0], alone[1][0], alone[2]),
            (packed[0][k], packed[1][k], packed[2][lo : lo + n]),
            strict=True,
        ):
            if n >= 16:
                assert torch.equal(a, b)
            else:
                torch.testing.assert_close(a, b, rtol=small, atol=small)


def test_short_bags_share_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of operations is what a step of short bags costs on a busy machine."""
    x, *weights = _operands(64, torch.float32)
    weights = [t.requires_grad_() for t in weights]
    counts = []
    for pairs in ([[0, 16]], [[2 * k, 2] for k in range(8)], [[0, 1], [1, 4], [5, 2], [7, 3]]):
        with Operations() as operations:
            gated_attention_pool(x, *weights, _bags(pairs))[0].sum().backward()
        counts.append(operations.count)
    assert max(counts) < 1.5 * counts[0]
    # the larger tiles of a GPU hold 64 bags like one
    monkeypatch.setattr(streaming, "_TILE", streaming._TILE_GPU)
    x = _operands(64 * 512, torch.float32)[0]
    for each in (64 * 512, 512):
        with Operations() as operations:
            pairs = torch.arange(0, len(x) + 1, each)
            gated_attention_pool(x, *weights, pairs)[0].sum().backward()
        counts.append(operations.count)
    assert counts[-1] <= counts[-2] + 10


class Operations(TorchDispatchMode):
    """Counts the operations that are run inside it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("pairs", "bad"), [(BAGS, 3), (MIXED, 1), (MIXED, 3), (MIXED, 5)])
def test_bag_of_nans_touches_no_other_bag(pairs: list[list[int]], bad: int) -> None:
    clean, dirty = _operands(), _operands()
    lo, hi = pairs[bad][0], sum(pairs[bad])
    dirty[0][lo:hi] = torch.nan
    results = []
    for operands in (clean, dirty):
        x = operands[0].requires_grad_()
        pooled, lse, logits = gated_attention_pool(*operands, _bags(pairs))
        (pooled.sum() + lse[0].sum() + logits.sum()).backward()
        results.append((pooled, lse, logits, x.grad))
    assert results[1][0][bad].isnan().all()
    others = [k for k in range(len(pairs)) if k != bad]
    rows = [*range(lo), *range(hi, 70)]
    for k, index in ((0, others), (1, others), (2, rows), (3, rows)):
        assert torch.equal(results[0][k][index], results[1][k][index])


def test_large_logits_do_not_overflow() -> None:
    operands = _operands(dtype=torch.float32)
    operands[5] *= 1e4
    pooled, lse, _ = gated_attention_pool(*operands, _bags([[0, 70]]))
    assert pooled.isfinite().all()
    assert lse.isfinite().all()


def test_padding_weighs_nothing_beside_very_small_logits() -> None:
    operands = _operands(dtype=torch.float32)
    pooled = gated_attention_pool(*operands, _bags(MIXED))[0]
    operands[6] = operands[6] - 1000
    shifted = gated_attention_pool(*operands, _bags(MIXED))[0]
    torch.testing.assert_close(shifted, pooled, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(streaming, "computes_in_bf16", lambda device: False)
    half = [t.requires_grad_() for t in _operands(dtype=dtype)]
    full = [t.detach().double().requires_grad_() for t in half]
    ours, theirs = (
        gated_attention_pool(*half, _bags(BAGS)),
        gated_attention_pool(*full, _bags(BAGS)),
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    ours[0].sum().backward()
    theirs[0].sum().backward()
    for a, b in zip(half, full, strict=True):
        assert a.grad.dtype == dtype
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_autocast_changes_nothing(dropout: float) -> None:
    operands = [t.requires_grad_() for t in _operands(dtype=torch.float32)]
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = gated_attention_pool(*operands, _bags(BAGS), dropout=dropout)
            if not dropout:  # autograd's own products follow the autocast around backward()
                out = (*out, *torch.autograd.grad(out[0].square().sum(), operands))
        results.append(out)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_drops_and_keeps_the_mean() -> None:
    operands = _operands()
    torch.manual_seed(0)
    drawn = torch.stack(
        [gated_attention_pool(*operands, _bags(BAGS), dropout=0.25)[2] for _ in range(500)]
    )
    exact = gated_attention_pool(*operands, _bags(BAGS))[2]
    assert drawn[:, 0].std(0).min() > 0.05
    torch.testing.assert_close(drawn.mean(0), exact, rtol=0, atol=0.3)


@pytest.mark.parametrize("keep", [0, 1 << 30], ids=["recomputed gates", "kept gates"])
def test_what_is_dropped_is_dropped_in_the_gradient_too(
    monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    monkeypatch.setattr(streaming, "_KEEP_BYTES", keep)
    operands = [t.requires_grad_() for t in _operands(45)]
    bags = _bags([[0, 3], [3, 4], [7, 38]])

    def op(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(5)
        return gated_attention_pool(*inputs, bags, dropout=0.25)

    assert torch.autograd.gradcheck(op, operands, fast_mode=True)
    another = gated_attention_pool(*operands, bags, dropout=0.25)
    assert not torch.equal(another[2], op(*operands)[2])


def test_frozen_inference_keeps_no_gates() -> None:
    operands = [t.requires_grad_() for t in _operands()]
    with torch.no_grad():
        pooled = gated_attention_pool(*operands, _bags(BAGS))[0]
    assert pooled.grad_fn is None
    assert torch.equal(pooled, gated_attention_pool(*operands, _bags(BAGS))[0])


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), max_size=5), st.integers(0, 99))
def test_any_slices_equal_the_reference(pairs: list[tuple[int, int]], seed: int) -> None:
    operands = _operands(seed=seed)
    bags = _bags([[start, min(length, 70 - start)] for start, length in pairs])
    theirs = pool_reference(operands[0], operands[1:], check_bags(bags, 70))
    for a, b in zip(gated_attention_pool(*operands, bags), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@settings(max_examples=25)
@given(st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 15, 16, 17, 30]), max_size=12))
def test_any_run_of_short_and_long_bags_equals_the_reference(lengths: list[int]) -> None:
    operands = [t.requires_grad_() for t in _operands(sum(lengths))]
    pairs, start = [], 0
    for length in lengths:
        pairs.append([start, length])
        start += length
    bags, results = _bags(pairs), []
    for pool in (
        lambda: gated_attention_pool(*operands, bags),
        lambda: pool_reference(operands[0], operands[1:], check_bags(bags, start)),
    ):
        pooled, lse, logits = pool()
        loss = pooled.sin().sum() + lse[bags[:, 1] > 0].sin().sum() + logits.sin().sum()
        results.append([pooled, lse, logits, *torch.autograd.grad(loss, operands)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "bad", "said"),
    [
        ("x", torch.zeros(70), r"x has shape \[70\]"),
        ("V", torch.zeros(H, D + 1), r"V has shape \[10, 13\].*give V the shape \[10, 12\]"),
        ("bu", torch.zeros(H + 1), r"bu has shape \[11\].*give bu the shape \[10\]"),
        ("Wc", torch.zeros(C, H - 1), r"Wc has shape \[3, 9\]"),
        ("bc", torch.zeros(C, dtype=torch.int64), r"bc is torch.int64; cast it"),
        ("bags", torch.tensor([0, 5, 3]), r"bags\[1\] = \(5, -2\)"),
        ("bags", torch.tensor([[0, 5], [66, 5]]), r"bags\[1\] = \(66, 5\) leaves the 70 rows"),
        ("bags", torch.tensor([[-1, 5]]), r"bags\[0\] = \(-1, 5\)"),
        ("bags", torch.tensor([[5, -1]]), r"bags\[0\] = \(5, -1\)"),
        ("dropout", 1.0, r"dropout is 1.0; give a probability"),
        ("reduce", (torch.zeros(D, D + 1), torch.zeros(D)), r"W1 has shape \[12, 13\], but x is"),
    ],
)
def test_bad_arguments_are_named(name: str, bad: Tensor | float, said: str) -> None:
    names = ["x", "V", "bv", "U", "bu", "Wc", "bc"]
    arguments = dict(zip(names, _operands(), strict=True)) | {"bags": _bags(BAGS), name: bad}
    with pytest.raises(ValueError, match=said):
        gated_attention_pool(**arguments)
