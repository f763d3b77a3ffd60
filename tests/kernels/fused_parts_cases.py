"""Pooling in parts through the fused kernels; run by test_gated_attention_pool_chunked.py.

By hand: `TRITON_INTERPRET=1 HMIL_KERNELS=fused pytest tests/kernels/fused_parts_cases.py`.
"""

import torch
from torch import Tensor

from hmil_fast.kernels.dispatch import choose
from hmil_fast.kernels.gated_attention_pool import gated_attention_pool
from hmil_fast.kernels.gated_attention_pool.chunked import pool_in_parts
from hmil_fast.kernels.gated_attention_pool.reference import pool_reference


def test_chunks_equal_float64() -> None:
    assert choose(torch.device("cpu")).name == "fused"
    generator = torch.Generator().manual_seed(0)
    shapes = [(150, 12), (40, 12), (20, 40), (20,), (20, 40), (20,), (3, 20), (3,)]
    exact = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    exact = [t.requires_grad_() for t in exact]
    x, *weights = (t.detach().float().requires_grad_() for t in exact)

    def pool(x: Tensor, A: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gated_attention_pool(torch.relu(x @ A.T), *weights, torch.tensor([[0, len(x)]]))

    ours = pool_in_parts(torch.split(x.detach(), [64, 0, 1, 85]), pool, weights)
    truth = pool_reference(torch.relu(exact[0] @ exact[1].T), exact[2:], [(0, 150)])
    for k in range(3):
        torch.testing.assert_close(ours[k].double(), truth[k], rtol=1e-4, atol=1e-5)
    mine = torch.autograd.grad(sum(t.sin().sum() for t in ours), weights)
    theirs = torch.autograd.grad(sum(t.sin().sum() for t in truth), exact[1:])
    for a, b in zip(mine, theirs, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 1e-4
