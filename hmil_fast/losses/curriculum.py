"""Curriculum weights and temperature as functions of progress e/E in [0, 1]."""

import math


def curriculum(kind: str, progress: float) -> tuple[float, float]:
    """Return the falling weight of the coarse terms and the rising weight of the contrastive term.

    The falling weight is β = 1 − e/E ("linear", the paper) or α = 1 − (e/E)² ("square", the
    authors' code). The rising weight is 1 minus the falling one. With "constant" both are 1.
    """
    if kind == "constant":
        return 1.0, 1.0
    falling = 1 - progress ** {"linear": 1, "square": 2}[kind]
    return falling, 1 - falling


def tau_released(progress: float, lowest: float = 0.1) -> float:
    """Return the temperature of the authors' code: 1 at start and end, `lowest` half-way."""
    return lowest + (1 - lowest) / 2 * (1 + math.cos(2 * math.pi * progress))
