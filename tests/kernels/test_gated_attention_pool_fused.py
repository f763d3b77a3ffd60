from collections.abc import Callable

import pytest
import torch

from hmil_fast.kernels.gated_attention_pool import gated_attention_pool
from hmil_fast.kernels.gated_attention_pool.op import pool


@pytest.mark.slow
@pytest.mark.parametrize("where", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_fused_kernels(where: str, run_fused_cases: Callable[[str, str], None]) -> None:
    run_fused_cases("pooling", where)


@pytest.mark.slow
def test_the_op_passes_opcheck_on_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(20, 6), (2, 5, 6), (2, 5), (3, 5), (3,)]
    for need_x in (True, False):
        operands = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
        operands[0].requires_grad_(need_x)
        bags = torch.tensor([[0, 4], [4, 0], [6, 12]])
        torch.library.opcheck(pool, (*operands, bags))


def test_compiles_whole_on_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(20, 6), (5, 6), (5,), (5, 6), (5,), (3, 5), (3,)]
    operands = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    bags = torch.tensor([[0, 4], [4, 0], [6, 12]])
    compiled = torch.compile(gated_attention_pool, fullgraph=True, backend="aot_eager")
    results = []
    for op in (gated_attention_pool, compiled):
        pooled, lse, logits = op(*operands, bags)
        loss = pooled.sin().sum() + lse[bags[:, 1] > 0].sum() + logits.sin().sum()
        results.append([pooled, lse, logits, *torch.autograd.grad(loss, operands)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
