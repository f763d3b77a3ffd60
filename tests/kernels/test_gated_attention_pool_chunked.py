"""One bag in chunks against the same bag whole; tests/models has shards on several processes."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hmil_fast.kernels.gated_attention_pool import gated_attention_pool
from hmil_fast.kernels.gated_attention_pool.chunked import merge, pool_in_parts

ROWS, WIDTH, D, H, C = 300, 9, 6, 5, 3


def operands(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Rows, an embedding, and the weights of the pool."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, WIDTH), (D, WIDTH), (H, D), (H,), (H, D), (H,), (C, H), (C,)]
    return [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


def pool(x: Tensor, A: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return gated_attention_pool(torch.relu(F.linear(x, A)), *weights, torch.tensor([[0, len(x)]]))


def results(found: tuple[Tensor, Tensor, Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
    """Results, and gradients of a loss in which all of them take part."""
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros(())
    for t in found:
        weight = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        loss = loss + (torch.where(t.isfinite(), t, 0) * weight).sum()
    return [*(t.detach() for t in found), *torch.autograd.grad(loss, wanted)]


def largest_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(
        float((a - b).abs().max() / b.abs().max()) if b.numel() else 0.0
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize(
    "sizes",
    [[300], [299, 1], [1, 0, 64, 63, 65, 107], [0, 300, 0], [1] * 20 + [280]],
    ids=str,
)
def test_chunks_equal_the_whole_bag(sizes: list[int]) -> None:
    x, *weights = (t.requires_grad_() for t in operands())
    whole = results(pool(x, *weights), weights)
    ours = results(pool_in_parts(torch.split(x.detach(), sizes), pool, weights), weights)
    assert largest_error(ours, whole) < 1e-13


def test_a_bag_of_nothing_has_no_gradient() -> None:
    x, *weights = (t.requires_grad_() for t in operands())
    for count in (1, 2):
        found = pool_in_parts([x.detach()[:0]] * count, pool, weights)
        assert (found[0] == 0).all()
        assert (found[1] == -torch.inf).all()
        assert found[2].shape == (0, C)
        assert all((g == 0).all() for g in results(found, weights)[3:])


def test_every_chunk_is_read_once_for_each_pass() -> None:
    class Chunks:
        def __init__(self) -> None:
            self.read: list[int] = []

        def __len__(self) -> int:
            return 3

        def __getitem__(self, k: int) -> Tensor:
            self.read.append(k)
            return x[100 * k : 100 * (k + 1)]

    x, *weights = operands()
    chunks = Chunks()
    with torch.no_grad():
        pool_in_parts(chunks, pool, weights)
    assert chunks.read == [0, 1, 2]
    found = pool_in_parts(chunks, pool, [t.requires_grad_() for t in weights])
    results(found, weights)
    assert chunks.read == [0, 1, 2, 0, 1, 2, 0, 1, 2]


def test_dropout_drops_the_same_when_a_chunk_comes_again() -> None:
    def dropping(x: Tensor, A: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bag = torch.tensor([[0, len(x)]])
        return gated_attention_pool(x @ A.T, *weights, bag, dropout=0.3)

    x, A, *weights = operands()
    chunks = [x[:100]] * 3

    def draw(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(3)
        found = pool_in_parts(chunks, dropping, [A, *weights], random=True)
        torch.manual_seed(4)
        return found

    assert torch.autograd.gradcheck(lambda A: draw(A)[0].sum(), A.requires_grad_(), fast_mode=True)
    found, state = draw(A), torch.get_rng_state()
    found[0].sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draw(A)[2], found[2])
    assert not torch.equal(found[2][:100], found[2][100:200])
    other = pool_in_parts(chunks, dropping, [A, *weights], random=True)
    assert not torch.equal(other[2], found[2])


def test_a_chunk_that_changes_its_length_is_named() -> None:
    x, *weights = (t.requires_grad_() for t in operands())
    chunks = list(torch.split(x.detach(), 100))
    found = pool_in_parts(chunks, pool, weights)
    chunks[1] = chunks[1][:99]
    with pytest.raises(ValueError, match="chunk 1 had 100 rows and now has 99; give the same"):
        results(found, weights)


def test_frozen_operands_get_no_gradient() -> None:
    x, *weights = operands()
    weights[1].requires_grad_()
    found = pool_in_parts(torch.split(x, 100), pool, weights)
    whole = results(pool(x, *weights), weights[1:2])
    assert largest_error(results(found, weights[1:2]), whole) < 1e-13
    assert not pool_in_parts([x], pool, [t.detach() for t in weights])[0].requires_grad


def test_autocast_holds_in_both_passes() -> None:
    x, *weights = (t.requires_grad_() for t in operands(torch.float32))
    seen = []

    def watched(x: Tensor, A: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(F.linear(x, A).dtype)
        return pool(x, A, *weights)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = pool_in_parts(torch.split(x.detach(), 64), watched, weights)
        whole = pool(x.detach(), *weights)
    assert largest_error(results(ours, weights), results(whole, weights)) < 1e-2
    assert seen == [torch.bfloat16] * 10


def test_merge_of_far_apart_parts() -> None:
    pooled = torch.tensor([[[1.0]], [[2.0]], [[0.0]], [[3.0]]]).requires_grad_()
    for lse, wanted, total in (
        ([-3e4, -3e4, -torch.inf, -5e4], 1.5, -3e4 + np.log(2)),
        ([9e4, 0.0, -torch.inf, -9e4], 1.0, 9e4),
        ([-torch.inf] * 4, 0.0, -torch.inf),
    ):
        parts = torch.tensor(lse)[:, None].requires_grad_()
        merged, merged_lse = merge(pooled, parts)
        assert merged.item() == wanted
        assert merged_lse.item() == pytest.approx(total)
        grads = torch.autograd.grad(merged.sum() + merged_lse.sum(), [pooled, parts])
        assert all(g.isfinite().all() for g in grads)
    merged, merged_lse = merge(
        torch.tensor([[[1.0]], [[torch.nan]]]), torch.tensor([[0], [torch.nan]])
    )
    assert merged.isnan().all()
    assert merged_lse.isnan().all()


@pytest.mark.slow
def test_the_fused_kernels_pool_in_parts(run_fused_cases: Callable[[str, str], None]) -> None:
    run_fused_cases("parts", "interpreter")
