"""Fixtures of the fused kernels' tests: a process that interprets Triton, poisoned memory."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hmil_fast.kernels.dispatch import interpreted

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def interpreter() -> None:
    """Skip where Triton's interpreter cannot run the kernels."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if _version(triton) < (3, 7) and _version(np) >= (2, 4):
        pytest.skip(
            f"the interpreter of Triton {triton.__version__} cannot loop with numpy "
            f"{np.__version__}; with numpy below 2.4 it can"
        )


@pytest.fixture
def run_fused_cases(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Run tests/kernels/fused_{name}_cases.py on a GPU, or in Triton's interpreter.

    It is a process of its own, because Triton decides when it is imported whether it interprets.
    """

    def run(name: str, where: str) -> None:
        pytest.importorskip("triton", reason="Triton is not installed")
        if where == "interpreter":
            request.getfixturevalue("interpreter")
        environment = os.environ | {"HMIL_KERNELS": "fused", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        environment["TRITON_INTERPRET"] = "1" if where == "interpreter" else "0"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"tests/kernels/fused_{name}_cases.py"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

    return run


def _version(module: object) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill new tensors with NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8, device="cpu" if interpreted() else "cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
