"""Compile every shipped configuration of the fused kernels for GPUs that need not be there.

sm_86, sm_89 and sm_120 have the configurations of sm_80 and less shared memory; they are compiled
for the larger number of classes only. After a change on purpose, run
`HMIL_AOT_UPDATE=1 pytest tests/kernels/test_aot.py` and commit the new counts. Triton keeps what it
compiled, so a second run takes seconds.
"""

import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from hmil_fast.kernels import launch  # noqa: E402
from hmil_fast.kernels.testing import SHARED_LIMIT, Usage, compile_ahead  # noqa: E402

pytestmark = pytest.mark.slow
COUNTS = Path(__file__).parent / "aot_counts.json"
VERSION = ".".join(triton.__version__.split(".")[:2])
TESTED = ("3.6", "3.8", "3.9")
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "tf32x3": torch.float32,
}
KERNELS = ("forward", "backward", "backward without x")
COMBINE = {"combine": True, "combine groups": False}  # whether it is the last level
KEPT = {f"forward with rows of {dim} kept": dim for dim in (128, 256, 512)}
Job = tuple[int, str, str, int]


def _jobs(arch: int) -> list[Job]:
    classes = (16, 32) if arch in (80, 90, 100) else (32,)
    # 512 columns do not fit 99 KB
    kept = [name for name, dim in KEPT.items() if dim < 512 or arch in (80, 90, 100)]
    return [
        *product([arch], KERNELS, DTYPES, classes),
        *product([arch], kept, ("bf16", "fp16"), classes),
        *product([arch], COMBINE, ["fp32"], (16,)),
    ]


def _name(job: Job) -> str:
    arch, kernel, precision, classes = job
    return f"sm_{arch} {kernel} {precision} {classes} classes"


def _compile(job: Job) -> Usage:
    from hmil_fast.kernels.gated_attention_pool import (
        fused_backward,
        fused_combine,
        fused_forward,
        fused_resident,
    )
    from hmil_fast.kernels.gated_attention_pool.configs import Pass, configuration, resident

    arch, name, precision, classes = job
    kernel: Any
    sizes = {"D": "i32!", "H": "i32!", "C": "i32"}
    if name in COMBINE:
        last = COMBINE[name]
        step = 2 if last else 4
        constants, options = fused_combine.combine_constants(torch.float32, step, last=last)
        kernel = fused_combine.add_up
        types = {n: "*fp32!" for n in kernel.arg_names if n not in constants} | sizes
        types |= {"parts": "*i64!"}
        del types["H"]
        return compile_ahead(kernel, types, constants, options, arch)
    if name in KEPT:
        kept = resident(DTYPES[precision], KEPT[name], classes, arch, interpreted=False)
        assert kept is not None
        kernel = fused_resident.tile_forward_resident
        constants = launch.constants(kept)
        types = {n: "*fp32!" for n in kernel.arg_names if n not in constants} | sizes
        types |= {"x": f"*{precision}!", "W": f"*{precision}!", "table": "*i64!"}
        del types["D"]
        return compile_ahead(kernel, types, constants, launch.options(kept), arch)
    kind: Pass = "forward" if name == "forward" else "backward"
    config = configuration(
        kind, DTYPES[precision], classes, arch, interpreted=False, exact=precision == "tf32x3"
    )
    kernel = getattr(fused_forward if kind == "forward" else fused_backward, f"tile_{kind}")
    constants = launch.constants(config)
    if kind == "backward":
        constants["NEED_X"] = name == "backward"
    width = precision if precision in ("bf16", "fp16") else "fp32"
    types = {n: "*fp32!" for n in kernel.arg_names if n not in constants} | sizes
    types |= {"x": f"*{width}!", "W": f"*{width}!", "table": "*i64!"}
    if kind == "backward":
        made = ("d_gates", "d_x", "d_pooled")
        types |= dict.fromkeys(made, "*bf16!" if width == "bf16" else "*fp32!")
        types |= {"before": "i32"}
    return compile_ahead(kernel, types, constants, launch.options(config), arch)


@pytest.fixture(scope="module", params=SHARED_LIMIT)
def arch(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def usages(arch: int) -> dict[str, Usage]:
    return {_name(job): _compile(job) for job in _jobs(arch)}


def test_nothing_spills(usages: dict[str, Usage]) -> None:
    assert {k: u for k, u in usages.items() if u.stack or u.local} == {}


def test_shared_memory_fits(usages: dict[str, Usage], arch: int) -> None:
    assert {k: u for k, u in usages.items() if u.shared > SHARED_LIMIT[arch]} == {}


def test_products_run_on_the_matrix_units(usages: dict[str, Usage]) -> None:
    assert {k for k, u in usages.items() if not u.matrix} == {k for k in usages if "combine" in k}


def test_the_newest_units_do_the_large_products(usages: dict[str, Usage], arch: int) -> None:
    """Not the instructions of sm_80, which the compiler falls back to."""
    old = {k for k, u in usages.items() if "combine" not in k and not u.newest}
    assert old == set() or arch not in (90, 100)


def test_matrix_instructions_are_those_recorded(usages: dict[str, Usage], arch: int) -> None:
    """They follow from the kernels and their shapes, alike in every release of Triton tested."""
    counts = {k: [u.matrix, u.newest] for k, u in usages.items()}
    recorded = json.loads(COUNTS.read_text(encoding="utf-8"))
    if os.environ.get("HMIL_AOT_UPDATE") == "1":
        gone = {k for k in recorded if f"sm_{arch} " in k} - set(counts)
        recorded = {k: v for k, v in recorded.items() if k not in gone} | counts
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(u)}" for k, u in recorded.items())
        COUNTS.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    # another release may choose other instructions; the bounds above hold for it too
    expected = {k: v for k, v in recorded.items() if f"sm_{arch} " in k}
    assert counts == expected or VERSION not in TESTED
