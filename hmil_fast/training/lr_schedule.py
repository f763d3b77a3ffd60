"""Schedule of the learning rate: warm-up, then constant or cosine."""

from math import cos, pi

from hmil_fast.recipe import Recipe


def lr_factor(recipe: Recipe, done: float) -> float:
    """Return the factor of the peak learning rate.

    It rises linearly over `warmup`. With the schedule "cosine" it falls to 0 at the end (Loshchilov
    and Hutter, ICLR 2017, without restarts).

    Args:
        recipe: Warm-up and schedule.
        done: Share of all epochs that has been trained, 0 to 1.
    """
    rising = min(1.0, done / recipe.warmup) if recipe.warmup else 1.0
    falling = (1 + cos(pi * done)) / 2 if recipe.lr_schedule == "cosine" else 1.0
    return rising * falling
