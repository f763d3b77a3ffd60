"""Block shapes of the fused kernels, per architecture.

None spills a register under Triton 3.6, 3.8 and 3.9 for D and H that are multiples of 16 and
aligned tensors: others run too, but slower, with spills.
tests/kernels/test_aot.py checks every entry ahead of time, without a GPU. That check and
arithmetic chose the shapes; no hardware has tuned them.
"""

from typing import Literal, NamedTuple

import torch
import triton.language as tl

Pass = Literal["forward", "backward"]
Precision = Literal["bf16", "fp16", "tf32", "tf32x3"]

# rows, hidden units, columns of a product, columns pooled at once, warps, stages
_Shape = tuple[int, int, int, int, int, int]
_SHAPES: dict[tuple[Pass, Precision], dict[int, _Shape]] = {
    ("forward", "bf16"): {
        80: (128, 64, 32, 16, 8, 3),
        90: (128, 64, 64, 128, 8, 3),
        100: (128, 64, 64, 64, 8, 3),
    },
    ("forward", "tf32"): {
        80: (64, 32, 32, 32, 8, 3),
        90: (128, 64, 32, 64, 8, 3),
        100: (128, 64, 32, 32, 8, 3),
    },
    ("forward", "tf32x3"): {
        80: (64, 16, 16, 32, 8, 2),
        90: (64, 32, 32, 32, 4, 2),
        100: (64, 32, 32, 16, 4, 2),
    },
    ("backward", "bf16"): {
        80: (128, 64, 32, 32, 8, 3),
        90: (128, 64, 32, 64, 8, 3),
        100: (128, 32, 32, 32, 8, 3),
    },
    ("backward", "fp16"): {
        80: (128, 32, 32, 32, 8, 3),
        90: (128, 32, 32, 64, 8, 3),
        100: (128, 32, 32, 32, 8, 3),
    },
    ("backward", "tf32"): dict.fromkeys((80, 90, 100), (64, 32, 32, 32, 4, 3)),
    ("backward", "tf32x3"): {
        80: (64, 16, 16, 32, 8, 2),
        90: (64, 32, 16, 32, 4, 2),
        100: (64, 16, 32, 32, 4, 2),
    },
}
_SHAPES["forward", "fp16"] = _SHAPES["forward", "bf16"]

# of the forward pass that keeps its rows, for half-precision x: by D, what fits the shared memory.
# 128 rows, else the weights that each tile reads would outweigh what is saved on rows.
# rows, hidden units, warps, stages
_RESIDENT: dict[int, dict[int, tuple[int, int, int, int]]] = {
    80: {128: (128, 32, 8, 3), 256: (128, 32, 8, 3), 512: (128, 16, 8, 2)},
    86: {128: (128, 32, 8, 3), 256: (128, 16, 8, 2)},
    90: {128: (128, 64, 8, 3), 256: (128, 64, 8, 2), 512: (128, 16, 8, 2)},
}
_RESIDENT[100] = _RESIDENT[90] | {256: (128, 32, 8, 3)}


class Config(NamedTuple):
    """Constants of a kernel that pools, and how it is launched."""

    ROWS: int
    BLOCK_H: int
    BLOCK_K: int
    BLOCK_D: int
    CLASSES: int
    SUM: tl.dtype
    SMALL: tl.dtype
    PRECISION: str
    UPCAST: bool
    APPROX: bool
    num_warps: int
    num_stages: int


class Resident(NamedTuple):
    """Constants of the forward kernel that keeps its rows, and how it is launched."""

    D: int
    ROWS: int
    BLOCK_H: int
    CLASSES: int
    UPCAST: bool
    APPROX: bool
    num_warps: int
    num_stages: int


def resident(
    dtype: torch.dtype, dim: int, classes: int, arch: int, *, interpreted: bool
) -> Resident | None:
    """The configuration of the forward pass that keeps its rows; None where that one cannot serve.

    It serves half-precision x whose D is in the table.

    Args:
        dtype: Of x.
        dim: D.
        classes: C.
        arch: Compute capability × 10.
        interpreted: Whether Triton's interpreter runs the kernel on a CPU.
    """
    # sm_86, sm_89 and sm_120 have 99 KB of shared memory for a block
    shape = _RESIDENT[{80: 80, 90: 90, 100: 100, 103: 100}.get(arch, 86)].get(dim)
    if shape is None or dtype not in (torch.float16, torch.bfloat16):
        return None
    rows, h, warps, stages = shape
    return Resident(
        D=dim,
        ROWS=rows,
        BLOCK_H=h,
        CLASSES=16 if classes <= 16 else 32,
        UPCAST=interpreted and dtype == torch.bfloat16,
        APPROX=not interpreted,
        num_warps=warps,
        num_stages=stages,
    )


def configuration(
    kind: Pass, dtype: torch.dtype, classes: int, arch: int, *, interpreted: bool, exact: bool
) -> Config:
    """The configuration of one pass.

    Args:
        kind: Which kernel.
        dtype: Of x.
        classes: C.
        arch: Compute capability × 10.
        interpreted: Whether Triton's interpreter runs the kernel on a CPU.
        exact: Whether products of float32 keep its precision (three products of tf32 each).
    """
    half = dtype in (torch.float16, torch.bfloat16)
    precision: Precision = "tf32x3" if exact else "tf32"
    if half:
        precision = "bf16" if dtype == torch.bfloat16 else "fp16"
    sums = tl.float64 if dtype == torch.float64 else tl.float32
    # others, consumer Blackwell (sm_120) too, have the matrix instructions of sm_80
    family = {90: 90, 100: 100, 103: 100}.get(arch, 80)
    rows, h, k, d, warps, stages = _SHAPES[kind, precision][family]
    return Config(
        ROWS=rows,
        BLOCK_H=h,
        BLOCK_K=k,
        BLOCK_D=d,
        CLASSES=16 if classes <= 16 else 32,
        SUM=sums,
        SMALL=_small(kind, dtype) or sums,
        # beside half-precision x what stays in float32 is multiplied in tf32: its 10 bits suffice
        PRECISION="ieee" if interpreted else "tf32" if half else precision,
        UPCAST=interpreted and dtype == torch.bfloat16,  # the interpreter's products are garbage
        APPROX=half and not interpreted,
        num_warps=warps,
        num_stages=stages,
    )


def _small(kind: Pass, dtype: torch.dtype) -> tl.dtype | None:
    """The dtype of products with classes on one side, if x decides it.

    They are in that of x. Not so the gradients beside float16: attention and gradient of one
    instance among many are smaller than what float16 holds. Scores are products of gates, at most
    1, and weights, which float16 holds as it does V and U.
    """
    if dtype == torch.bfloat16:
        return tl.bfloat16
    return tl.float16 if dtype == torch.float16 and kind == "forward" else None
