import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hmil_fast.kernels.gated_attention_pool import gated_attention_pool
from hmil_fast.kernels.gated_attention_pool.op import pool

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("where", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_fused_kernels(where: str) -> None:
    """Runs fused_pooling_cases.py, which see."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if where == "interpreter" and _version(triton) < (3, 7) and _version(np) >= (2, 4):
        pytest.skip(
            f"the interpreter of Triton {triton.__version__} cannot loop with numpy "
            f"{np.__version__}; with numpy below 2.4 it can"
        )
    environment = os.environ | {"HMIL_KERNELS": "fused", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    environment["TRITON_INTERPRET"] = "1" if where == "interpreter" else "0"
    said = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/kernels/fused_pooling_cases.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert said.returncode == 0, said.stdout[-8000:] + said.stderr[-2000:]


def _version(module: object) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


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
