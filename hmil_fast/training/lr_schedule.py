"""The learning rate over a training."""

from math import cos, pi

from hmil_fast.presets import LossSettings


def rate_factor(settings: LossSettings, done: float) -> float:
    """What the learning rate is multiplied by.

    It rises in a straight line over `warmup`; by the schedule "cosine" it falls all the while, to 0
    at the end (Loshchilov and Hutter, ICLR 2017, without restarts).

    Args:
        settings: Of the preset.
        done: Share of all epochs that is trained, 0 to 1.
    """
    rising = min(1.0, done / settings.warmup) if settings.warmup else 1.0
    falling = (1 + cos(pi * done)) / 2 if settings.lr_schedule == "cosine" else 1.0
    return rising * falling
