"""Compile every shipped configuration of the fused kernels for GPUs that need not be there.

After a change on purpose: `HMIL_AOT_UPDATE=1 pytest tests/kernels/test_aot.py`, and commit the new
counts. Triton keeps what it compiled, so a second run takes seconds.
"""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from hmil_fast.kernels import launch  # noqa: E402
from hmil_fast.kernels.testing import SHARED_LIMIT, Usage, compile_ahead  # noqa: E402

COUNTS = Path(__file__).parent / "aot_counts.json"
VERSION = ".".join(triton.__version__.split(".")[:2])
TESTED = ("3.6", "3.8", "3.9")
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "tf32x3": torch.float32,
}
KERNELS = ("forward", "backward", "backward without x", "combine")
Job = tuple[int, str, str, int]
JOBS: list[Job] = [
    *product(SHARED_LIMIT, KERNELS[:3], DTYPES, (16, 32)),
    *product(SHARED_LIMIT, KERNELS[3:], ["fp32"], (16,)),
]


def _name(job: Job) -> str:
    arch, kernel, precision, classes = job
    return f"sm_{arch} {kernel} {precision} {classes} classes"


def _compile(job: Job) -> Usage:
    from hmil_fast.kernels.gated_attention_pool import fused_backward, fused_forward
    from hmil_fast.kernels.gated_attention_pool.configs import Pass, configuration

    arch, name, precision, classes = job
    sizes = {"D": "i32!", "H": "i32!", "C": "i32"}
    if name == "combine":
        types = sizes | dict.fromkeys(("tile_max", "tile_sum", "tile_pooled"), "*fp32!")
        types |= {"bag_tiles": "*i64!", "pooled": "*fp32!", "lse": "*fp32!"}
        del types["H"]
        constants, options = fused_forward.combine_constants(triton.language.float32)
        return compile_ahead(fused_forward.combine_tiles, types, constants, options, arch)
    kind: Pass = "forward" if name == "forward" else "backward"
    config = configuration(
        kind, DTYPES[precision], classes, arch, interpreted=False, exact=precision == "tf32x3"
    )
    kernel: Any = getattr(fused_forward if kind == "forward" else fused_backward, f"tile_{kind}")
    constants = launch.constants(config)
    if kind == "backward":
        constants["NEED_X"] = name == "backward"
    width = precision if precision in ("bf16", "fp16") else "fp32"
    types = {n: "*fp32!" for n in kernel.arg_names if n not in constants} | sizes
    types |= {"x": f"*{width}!", "W": f"*{width}!", "table": "*i64!"}
    if kind == "backward":
        types |= dict.fromkeys(("d_gates", "d_x"), "*bf16!" if width == "bf16" else "*fp32!")
    return compile_ahead(kernel, types, constants, launch.options(config), arch)


@pytest.fixture(scope="module")
def usages() -> dict[str, Usage]:
    # two processes: the compiler is single-threaded, and this process may be interpreting
    environment = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            found = pool.map(_compile, JOBS, chunksize=4)
            return dict(zip(map(_name, JOBS), found, strict=True))
    finally:
        if environment is not None:
            os.environ["TRITON_INTERPRET"] = environment


def test_nothing_spills(usages: dict[str, Usage]) -> None:
    assert {k: u for k, u in usages.items() if u.stack or u.local} == {}


def test_shared_memory_fits(usages: dict[str, Usage]) -> None:
    limits = {_name(job): SHARED_LIMIT[job[0]] for job in JOBS}
    assert {k: u for k, u in usages.items() if u.shared > limits[k]} == {}


def test_products_run_on_the_matrix_units(usages: dict[str, Usage]) -> None:
    assert {k for k, u in usages.items() if not u.matrix} == {k for k in usages if "combine" in k}


def test_the_newest_units_do_the_large_products(usages: dict[str, Usage]) -> None:
    """Not the instructions of sm_80, which the compiler falls back to."""
    large = {k: u for k, u in usages.items() if "sm_90 " in k or "sm_100 " in k}
    old = {k for k, u in large.items() if "combine" not in k and not u.newest}
    assert old == set()


def test_matrix_instructions_are_those_recorded(usages: dict[str, Usage]) -> None:
    """They follow from the kernels and their shapes, alike in every release of Triton tested."""
    found = {k: [u.matrix, u.newest] for k, u in usages.items()}
    if os.environ.get("HMIL_AOT_UPDATE") == "1":
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(u)}" for k, u in found.items())
        COUNTS.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    # another release may choose other instructions; the bounds above hold for it too
    assert found == json.loads(COUNTS.read_text(encoding="utf-8")) or VERSION not in TESTED
