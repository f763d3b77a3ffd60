"""Compile the fused kernels of the losses for GPUs that need not be there.

The counts are kept, and renewed, as in test_aot.py.
"""

import json
import os
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402

from hmil_fast.kernels import launch  # noqa: E402
from hmil_fast.kernels.hierarchy_alignment import fused as alignment  # noqa: E402
from hmil_fast.kernels.supcon import fused as supcon  # noqa: E402
from hmil_fast.kernels.supcon import fused_resident  # noqa: E402
from hmil_fast.kernels.testing import SHARED_LIMIT, Usage, compile_ahead  # noqa: E402

pytestmark = pytest.mark.slow
COUNTS = Path(__file__).parent / "aot_counts_losses.json"
VERSION = ".".join(triton.__version__.split(".")[:2])
TESTED = ("3.6", "3.8", "3.9")
FLOATS = "*fp32!"


def _check(name: str, usage: Usage, arch: int) -> None:
    assert (usage.stack, usage.local) == (0, 0)
    assert usage.shared <= SHARED_LIMIT[arch]
    recorded = json.loads(COUNTS.read_text(encoding="utf-8"))
    found, name = [usage.matrix, usage.newest], f"sm_{arch} {name}"
    if os.environ.get("HMIL_AOT_UPDATE") == "1":
        recorded[name] = found
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(u)}" for k, u in recorded.items())
        COUNTS.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    # another release may choose other instructions; the bounds hold for it too
    assert found == recorded[name] or VERSION not in TESTED


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize("direction", ["lse", "backward"])
def test_supcon(direction: str, precision: str, arch: int) -> None:
    forward = direction == "lse"
    kernel = supcon.lse_kernel if forward else supcon.backward_kernel
    config = (supcon.LSE if forward else supcon.BACKWARD)[precision]
    constants = (
        launch.constants(config) | {"SUM": tl.float32} | ({} if forward else {"BLOCK_D": 256})
    )
    types = {name: FLOATS for name in kernel.arg_names if name not in constants}
    types |= {"scale": "fp32", "R": "i32", "D": "i32!", "SHARE": "i32!"}
    usage = compile_ahead(kernel, types, constants, launch.options(config), arch)
    _check(f"supcon {direction} {precision}", usage, arch)
    assert usage.matrix
    if precision == "tf32" and arch in (90, 100):
        assert usage.newest  # not the instructions of sm_80, which the compiler falls back to


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("direction", ["lse", "backward"])
def test_supcon_that_keeps_its_rows(direction: str, width: int, arch: int) -> None:
    config = fused_resident.configuration(
        backward=direction == "backward", dim=width, precision="tf32", arch=arch
    )
    small = arch in (86, 89, 120)
    assert (config is None) == (small and direction == "lse" and width == 256)
    if config is None:
        return
    kernel = getattr(fused_resident, f"{direction}_kernel")
    constants = launch.constants(config) | {"SUM": tl.float32}
    types = {name: FLOATS for name in kernel.arg_names if name not in constants}
    types |= {"scale": "fp32", "R": "i32", "D": "i32!", "SHARE": "i32!"}
    usage = compile_ahead(kernel, types, constants, launch.options(config), arch)
    _check(f"supcon {direction} of {width} kept", usage, arch)
    assert usage.matrix
    if arch in (90, 100):
        assert usage.newest


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_alignment(direction: str, arch: int) -> None:
    kernel = getattr(alignment, f"{direction}_kernel")
    constants = {"COARSE": 32, "FINE": 32, "ROWS": alignment.ROWS}  # the most there may be
    types = {name: FLOATS for name in kernel.arg_names if name not in constants}
    types |= {"parent": "*i64!", "table": "*i64!", "CC": "i32", "CF": "i32"}
    usage = compile_ahead(kernel, types, constants, alignment.OPTIONS, arch)
    _check(f"alignment {direction}", usage, arch)
