import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("where", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("op", ["supcon", "alignment"])
def test_fused_kernels(op: str, where: str) -> None:
    """Runs fused_supcon_cases.py and fused_alignment_cases.py, which see."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if where == "interpreter" and _version(triton) < (3, 7) and _version(np) >= (2, 4):
        pytest.skip(
            f"the interpreter of Triton {triton.__version__} cannot loop with numpy "
            f"{np.__version__}; with numpy below 2.4 it can"
        )
    environment = os.environ | {"HMIL_KERNELS": "fused", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    environment["TRITON_INTERPRET"] = "1" if where == "interpreter" else "0"
    said = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"tests/kernels/fused_{op}_cases.py"],
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
