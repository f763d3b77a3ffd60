"""The fused pooling kernels against float64, on a GPU or through Triton's interpreter.

test_gated_attention_pool_fused.py runs this file in a process of its own, because Triton decides
when it is imported whether it interprets; by hand:
`TRITON_INTERPRET=1 HMIL_KERNELS=fused pytest tests/kernels/fused_pooling_cases.py`.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from hmil_fast.kernels.bags import check_bags
from hmil_fast.kernels.dispatch import choose, interpreted
from hmil_fast.kernels.gated_attention_pool import gated_attention_pool
from hmil_fast.kernels.gated_attention_pool.configs import configuration, resident
from hmil_fast.kernels.gated_attention_pool.op import pool, runs_fused
from hmil_fast.kernels.gated_attention_pool.reference import pool_reference

DEVICE = torch.device("cpu" if interpreted() else "cuda")
D = 40  # several blocks, the last not whole; so is the width H of a dtype
HALF = [torch.float16, torch.bfloat16]
KEPT = 128  # of rows of half precision that stay on the chip
DTYPES = [(torch.float32, D), *product(HALF, (D, KEPT))]  # with D
TOLERANCE = {  # RMS of the error over RMS of the truth
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 3e-2,
}
on_gpu = pytest.mark.skipif(interpreted(), reason="needs a CUDA device")


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _arch() -> int:
    if interpreted():
        return 80
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _tile(dtype: torch.dtype, dim: int) -> int:
    """Rows of a tile, of the forward pass."""
    kept = resident(dtype, dim, 1, _arch(), interpreted=interpreted())
    return (
        kept or configuration("forward", dtype, 1, _arch(), interpreted=interpreted(), exact=True)
    ).ROWS


def _packed(lengths: list[int]) -> tuple[Tensor, int]:
    """Bags in x in another order than in the batch, with rows between them in no bag."""
    pairs, end = {}, 3
    for k in [*range(1, len(lengths), 2), *range(0, len(lengths), 2)]:
        pairs[k] = [end, lengths[k]]
        end += lengths[k] + (k % 3)
    return torch.tensor([pairs[k] for k in range(len(lengths))]).reshape(-1, 2), end + 5


def _operands(rows: int, classes: int, dtype: torch.dtype, dim: int = D) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    H = 40 if interpreted() and dtype not in HALF else 70
    shapes = [(rows, dim), (H, dim), (H,), (H, dim), (H,), (classes, H), (classes,)]
    gate = 0.3 * (D / dim) ** 0.5
    scales = [1.0, gate, 0.3, gate, 0.3, 0.5, 1.0]
    return [
        (torch.randn(s, generator=generator) * k).to(dtype).to(DEVICE)
        for s, k in zip(shapes, scales, strict=True)
    ]


def _error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.isfinite().all()
    return float(
        (ours.detach().double() - theirs.detach()).square().mean().sqrt()
        / theirs.detach().square().mean().sqrt().clamp_min(1e-3)
    )


def _run(operands: list[Tensor], bags: Tensor, truth: bool) -> list[Tensor]:
    """Results and the gradients of what requires one."""
    if truth:
        pooled, lse, logits = pool_reference(operands[0], operands[1:], check_bags(bags, 10**9))
    else:
        pooled, lse, logits = gated_attention_pool(*operands, bags)
    full = (bags[:, 1] > 0).to(DEVICE)
    assert (pooled[~full] == 0).all()
    assert (lse[~full] == -torch.inf).all()
    wanted = [t for t in operands if t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (t * torch.randn(t.shape, generator=generator).to(DEVICE, t.dtype)).sum()
        for t in (pooled, lse[full], logits)
    )
    return [pooled, lse[full], logits, *torch.autograd.grad(loss, wanted)]


def _compare(operands: list[Tensor], bags: Tensor) -> None:
    truth = [t.detach().double().requires_grad_(t.requires_grad) for t in operands]
    dtype = operands[0].dtype
    for k, (ours, theirs) in enumerate(
        zip(_run(operands, bags, False), _run(truth, bags, True), strict=True)
    ):
        assert _error(ours, theirs) < TOLERANCE[dtype], f"result {k}"


@pytest.mark.parametrize("classes", [1, 7, 16, 17])
@pytest.mark.parametrize(("dtype", "dim"), DTYPES)
def test_results_and_gradients_equal_float64(dtype: torch.dtype, dim: int, classes: int) -> None:
    block = _tile(dtype, dim)
    bags, rows = _packed([0, 1, 2, block - 1, block, block + 1, 3 * block + 5])
    operands = [t.requires_grad_() for t in _operands(rows, classes, dtype, dim)]
    kept = resident(dtype, dim, classes, _arch(), interpreted=interpreted())
    assert (kept is not None) == (dim == KEPT)
    assert runs_fused(operands[0], operands[5].float(), check_bags(bags, rows))
    _compare(operands, bags)


@pytest.mark.parametrize("dim", [256, 512])
@pytest.mark.parametrize("dtype", HALF)
def test_wider_rows_that_are_kept(dtype: torch.dtype, dim: int) -> None:
    block = _tile(dtype, dim)
    bags, rows = _packed([block + 1, 0, 1, 2])
    _compare([t.requires_grad_() for t in _operands(rows, 3, dtype, dim)], bags)


@pytest.mark.parametrize(("dtype", "dim"), DTYPES)
def test_frozen_and_strided_features_in_bags_end_to_end(dtype: torch.dtype, dim: int) -> None:
    bags = torch.tensor([[0, 5], [5, 130], [135, 64]])
    x, *weights = _operands(199, 3, dtype, dim)
    x = torch.stack([x, -x], 2)[:, :, 0]
    assert not x.is_contiguous()
    _compare([x, *(t.requires_grad_() for t in weights)], bags)
    _compare([x.requires_grad_(), *(t.detach() for t in weights)], bags)


def test_tiles_of_a_long_bag_are_added_up_in_two_levels() -> None:
    block = _tile(torch.float32, D)
    lengths = [65 * block + 1, 5, 64 * block, 0]
    bags, rows = _packed(lengths)
    operands = _operands(rows, 2, torch.float32)
    pooled, lse, logits = gated_attention_pool(*operands, bags)
    exact, *weights = (t.double() for t in operands)
    truth = pool_reference(exact, weights, check_bags(bags, rows))
    full = (bags[:, 1] > 0).to(DEVICE)
    assert (pooled[~full] == 0).all()
    assert (lse[~full] == -torch.inf).all()
    for ours, theirs in (
        (pooled, truth[0]), (lse[full], truth[1][full]), (logits, truth[2]),
    ):  # fmt: skip
        assert _error(ours, theirs) < TOLERANCE[torch.float32]
    for k in (0, 2):  # 64 tiles alone need one level only
        start, length = bags[k].tolist()
        alone = gated_attention_pool(
            operands[0][start : start + length].clone(),
            *operands[1:],
            torch.tensor([[0, length]]),
        )
        assert torch.equal(alone[0][0], pooled[k])
        assert torch.equal(alone[1][0], lse[k])


def test_several_chunks_of_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hmil_fast.kernels.tiles._CHUNK", 150)
    for bags, rows in (_packed([3, 200, 0, 170, 90]), (torch.tensor([[0, 400], [400, 63]]), 463)):
        for dtype in (torch.float32, torch.float16):
            _compare([t.requires_grad_() for t in _operands(rows, 3, dtype)], bags)


@pytest.mark.parametrize(("dtype", "dim"), DTYPES)
def test_alone_packed_and_elsewhere_are_bitwise_equal(dtype: torch.dtype, dim: int) -> None:
    block = _tile(dtype, dim)
    lengths = [1, 2, block - 1, block, block + 1, 2 * block + 5]
    bags, rows = _packed(lengths)
    x, *weights = _operands(rows, 3, dtype, dim)
    pooled, lse, logits = gated_attention_pool(x, *weights, bags)
    for k, (start, length) in enumerate(bags.tolist()):
        part = x[start : start + length].clone()
        alone = gated_attention_pool(part, *weights, torch.tensor([[0, length]]))
        assert torch.equal(alone[0][0], pooled[k])
        assert torch.equal(alone[1][0], lse[k])
        assert torch.equal(alone[2], logits[start : start + length])


@pytest.mark.parametrize(("dtype", "dim"), DTYPES)
def test_bag_of_nans_touches_no_other_bag(dtype: torch.dtype, dim: int) -> None:
    bags = torch.tensor([[0, 5], [5, 70], [75, 2], [77, 0], [77, 140]])
    results = []
    for bad in (False, True):
        operands = _operands(217, 3, dtype, dim)
        if bad:
            operands[0][5:75] = torch.nan
        operands[0].requires_grad_()
        pooled, lse, logits = gated_attention_pool(*operands, bags)
        pooled.sum().backward()
        results.append((pooled, lse, logits, operands[0].grad))
    assert results[1][0][1].isnan().all()
    assert results[1][1][1].isnan().all()
    others, rows = [0, 2, 3, 4], [*range(5), *range(75, 217)]
    for k, index in ((0, others), (1, others), (2, rows), (3, rows)):
        assert torch.equal(results[0][k][index], results[1][k][index])


def test_rows_in_no_bag_do_not_count() -> None:
    operands = _operands(60, 3, torch.float32)
    operands[0][20:30] = torch.nan
    operands = [t.requires_grad_() for t in operands]
    pooled, _, logits = gated_attention_pool(*operands, torch.tensor([[0, 20], [30, 25]]))
    assert (logits[20:30] == 0).all()
    assert (logits[55:] == 0).all()
    (pooled.sum() + logits.sum()).backward()
    assert all(t.grad.isfinite().all() for t in operands)
    assert (operands[0].grad[20:30] == 0).all()


@pytest.mark.parametrize("pairs", [[], [[4, 0]], [[4, 0], [0, 0]]])
def test_nothing_to_pool(pairs: list[list[int]]) -> None:
    operands = [t.requires_grad_() for t in _operands(9, 3, torch.float32)]
    bags = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    pooled, lse, logits = gated_attention_pool(*operands, bags)
    assert pooled.shape == (len(pairs), 3, D)
    (pooled.sum() + logits.sum() + lse.sum()).backward()
    assert all((t.grad == 0).all() for t in operands)


def test_bag_of_one_is_its_instance() -> None:
    x, *weights = _operands(9, 3, torch.float32)
    pooled, lse, logits = gated_attention_pool(x, *weights, torch.tensor([[8, 1]]))
    torch.testing.assert_close(pooled[0], x[8].expand(3, D), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse[0], logits[8])


def test_large_logits_do_not_overflow() -> None:
    operands = _operands(300, 3, torch.float32)
    operands[5] *= 1e4
    operands[1] *= 1e3
    operands = [t.requires_grad_() for t in operands]
    pooled, lse, _ = gated_attention_pool(*operands, torch.tensor([[0, 300]]))
    pooled.sum().backward()
    assert pooled.isfinite().all()
    assert lse.isfinite().all()
    assert all(t.grad.isfinite().all() for t in operands)


def test_rows_beside_a_bag_weigh_nothing_beside_very_small_logits() -> None:
    """A row of zeros, as loads beyond a bag give, would have the logit bc, above all others."""
    x, V, bv, U, bu, Wc, bc = _operands(133, 3, torch.float32)
    operands = [x.abs(), V.abs(), 0 * bv, U, bu, -100 * Wc.abs(), bc]
    pooled, lse, logits = gated_attention_pool(*operands, torch.tensor([[0, 133]]))
    assert (logits < bc - 500).all()
    assert (lse < bc - 500).all()
    weight = torch.softmax(logits.double(), 0)
    torch.testing.assert_close(
        pooled[0].double(), weight.T @ operands[0].double(), rtol=1e-4, atol=0
    )


def test_a_bag_outside_x_is_named() -> None:
    operands = _operands(40, 3, torch.float32)
    with pytest.raises(ValueError, match=r"bags\[1\] = \(36, 5\) leaves the 40 rows"):
        gated_attention_pool(*operands, torch.tensor([[0, 5], [36, 5]]))


def test_tiny_gradients_of_half_precision_do_not_vanish() -> None:
    """Of one instance in a large bag, of a loss averaged over many: below what float16 can hold."""
    operands = [t.requires_grad_() for t in _operands(200, 3, torch.float16)]
    weights = [t.detach().float().requires_grad_() for t in operands[1:]]
    truth = [t.detach().double().requires_grad_() for t in operands]
    bags = torch.tensor([[0, 200]])
    mine = gated_attention_pool(operands[0], *weights, bags)[0].sum() * 1e-7
    theirs = pool_reference(truth[0], truth[1:], [(0, 200)])[0].sum() * 1e-7
    for a, b in zip(
        torch.autograd.grad(mine, weights[:-1]),
        torch.autograd.grad(theirs, truth[1:-1]),
        strict=True,
    ):
        assert float((a.double() - b).norm() / b.norm()) < 2e-2


def test_autocast_changes_nothing() -> None:
    operands = [t.requires_grad_() for t in _operands(150, 3, torch.float32)]
    bags, results = torch.tensor([[0, 20], [20, 130]]), []
    for enabled in (False, True):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=enabled):
            out = gated_attention_pool(*operands, bags)
            results.append([*out, *torch.autograd.grad(out[0].square().sum(), operands)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_the_kernels_do_not_serve_runs_as_reference() -> None:
    for bags, classes in ((torch.tensor([[0, 20], [10, 30]]), 3), (torch.tensor([[0, 40]]), 33)):
        operands = [t.requires_grad_() for t in _operands(40, classes, torch.float32)]
        assert choose(DEVICE).name == "fused"
        assert not runs_fused(operands[0], operands[5], check_bags(bags, 40))
        _compare(operands, bags)


@pytest.mark.skipif(not interpreted(), reason="the sums of float64 are for the interpreter")
def test_gradcheck_with_respect_to_everything() -> None:
    operands = [t.requires_grad_() for t in _operands(20, 3, torch.float64)]
    bags = torch.tensor([[0, 1], [3, 17], [2, 0]])
    assert runs_fused(operands[0], operands[5], check_bags(bags, 20))

    def op(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled, lse, logits = gated_attention_pool(*inputs, bags)
        return pooled, lse[:2], logits

    assert torch.autograd.gradcheck(op, operands, fast_mode=True)
    _compare(operands, bags)


def test_the_op_passes_opcheck_and_compiles_whole() -> None:
    x, V, bv, U, bu, Wc, bc = (t.requires_grad_() for t in _operands(9, 2, torch.float32))
    bags = torch.tensor([[0, 3], [3, 0], [4, 5]])
    W, b = torch.stack([V, U]), torch.stack([bv, bu])
    arguments = [t.detach().requires_grad_() for t in (x, W, b, Wc, bc)]
    torch.library.opcheck(pool, (*arguments, bags))
    operands = [x, V, bv, U, bu, Wc, bc]
    compiled = torch.compile(gated_attention_pool, fullgraph=True, backend="aot_eager")
    results = []
    for op in (gated_attention_pool, compiled):
        pooled, _, logits = op(*operands, bags)
        grads = torch.autograd.grad(pooled.sin().sum() + logits.sin().sum(), operands)
        results.append([pooled, logits, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@on_gpu
@pytest.mark.parametrize(("dtype", "dim"), DTYPES)
def test_twenty_runs_are_bitwise_equal(dtype: torch.dtype, dim: int) -> None:
    bags, rows = _packed([1, 5000, 0, 20000, 77])
    operands = [t.requires_grad_() for t in _operands(rows, 7, dtype, dim)]
    first = _run(operands, bags, False)
    for _ in range(19):
        assert all(
            torch.equal(a, b) for a, b in zip(first, _run(operands, bags, False), strict=True)
        )


@on_gpu
def test_more_than_two_to_the_31_elements() -> None:
    weights = _operands(1, 3, torch.bfloat16)[1:]
    rows = 2**31 // D + 1000
    x = torch.zeros(rows, D, dtype=torch.bfloat16, device=DEVICE)
    x[-900:] = torch.randn(900, D, device=DEVICE).bfloat16()
    far = gated_attention_pool(x, *weights, torch.tensor([[rows - 900, 900]]))
    near = gated_attention_pool(x[-900:].clone(), *weights, torch.tensor([[0, 900]]))
    assert torch.equal(far[0], near[0])
    assert torch.equal(far[2][-900:], near[2])
