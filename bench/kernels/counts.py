"""Compute FLOP and bytes of a case by formula, and the least time they take on a machine.

Per instance, for the folded form with fused pooling; each stage is a kernel that reads its inputs
from memory and writes its results there, at the ceilings that were measured on the machine.
"""

from typing import NamedTuple

FEATURES, HIDDEN = 1024, 256
CLASSES = (3, 7)
GATES = (256, 64)  # per level
POOL = (1024, 256, 7)  # D, H, C: attention on features of 1024
CORE = (HIDDEN, sum(GATES), sum(CLASSES))  # both levels of HMIL after the fold
EMBEDDING = 256  # columns of the rows of SupCon


class Stage(NamedTuple):
    """What one kernel does for one instance."""

    flop: float
    bytes: float


def pool_forward(shape: tuple[int, int, int], b: int) -> list[Stage]:
    """Gates, scores and weighted sums, x read once; b is the bytes of an element."""
    d, h, c = shape
    return [Stage(4 * d * h + 2 * h * c + 2 * c * d, d * b + 4 * c)]


def pool_backward(
    shape: tuple[int, int, int], b: int, need_x: bool, masked: bool = False
) -> list[Stage]:
    """Gates again and their gradients, then products; masked: ReLU's mask on x's gradient."""
    d, h, c = shape
    stages = [
        Stage(4 * d * h + 4 * h * c + 2 * c * d, (d + 2 * h) * b + 8 * c),
        Stage(4 * d * h, (d + 2 * h) * b),
    ]
    if need_x:
        stages.append(Stage(4 * d * h + 2 * c * d, (2 * h + d * (2 if masked else 1)) * b))
    return stages


def stages(family: str, phase: str, rows: int, b: int) -> list[Stage]:
    """Of one case."""
    reduce = Stage(2 * FEATURES * HIDDEN, (FEATURES + HIDDEN) * b)
    if family == "supcon":  # in float32; the symmetry of the products is not used
        forward = [Stage(2 * rows * EMBEDDING, 4 * EMBEDDING)]
        backward = [Stage(4 * rows * EMBEDDING, 8 * EMBEDDING)]
    elif family == "alignment":  # elementwise: far from any arithmetic ceiling
        forward = [Stage(0, 4 * sum(CLASSES))]
        backward = [Stage(0, 8 * sum(CLASSES))]
    elif family == "hmil":
        forward = [reduce, *pool_forward(CORE, b)]
        backward = [*pool_backward(CORE, b, need_x=True, masked=True), reduce]
    else:
        shape = CORE if family == "core" else POOL
        forward = pool_forward(shape, b)
        backward = pool_backward(shape, b, need_x=family == "core")
    return forward if phase == "forward" else forward + backward


def unfolded_flop(phase: str) -> float:
    """Of HMIL per instance as published, forward once: h of both levels is made."""
    (c1, c2), (g1, g2) = CLASSES, GATES
    level_1 = 2 * HIDDEN * FEATURES + 4 * FEATURES * g1 + 2 * c1 * (g1 + FEATURES)
    level_2 = 2 * FEATURES * HIDDEN + 4 * HIDDEN * g2 + 2 * c2 * (g2 + HIDDEN)
    reduce = 2 * FEATURES * HIDDEN
    forward = reduce + level_1 + level_2
    return forward if phase == "forward" else 3 * forward - reduce


def floor_seconds(
    work: list[Stage], rows: int, flop_per_second: float, bytes_per_second: float
) -> float:
    """Every stage at the higher of its two costs, one after another."""
    return rows * sum(max(s.flop / flop_per_second, s.bytes / bytes_per_second) for s in work)
