"""Weights and temperatures over training, from progress e/E in [0, 1]."""

import math


def curriculum(kind: str, progress: float) -> tuple[float, float]:
    """Weights of the coarse terms, falling, and of the contrastive one, rising.

    The falling one is β = 1 − e/E ("linear", the paper) or α = 1 − (e/E)² ("square", the authors'
    code), the rising one what it lacks of 1; "constant" is 1 and 1.
    """
    if kind == "constant":
        return 1.0, 1.0
    falling = 1 - progress ** {"linear": 1, "square": 2}[kind]
    return falling, 1 - falling


def tau_released(progress: float, lowest: float = 0.1) -> float:
    """Temperature in the authors' code: 1 at the start, `lowest` half-way, 1 again at the end."""
    return lowest + (1 - lowest) / 2 * (1 + math.cos(2 * math.pi * progress))
