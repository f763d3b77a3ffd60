"""Weights and temperatures over training, from progress e/E in [0, 1]."""

import math


def beta_paper(progress: float) -> float:
    """Curriculum weight of the coarse terms, falling in a straight line: 1 − e/E."""
    return 1 - progress


def alpha_released(progress: float) -> float:
    """Curriculum weight of the coarse terms in the authors' code: 1 − (e/E)²."""
    return 1 - progress**2


def tau_released(progress: float) -> float:
    """Temperature in the authors' code: 1 at the start, 0.1 half-way, 1 again at the end."""
    return 0.1 + 0.45 * (1 + math.cos(2 * math.pi * progress))
