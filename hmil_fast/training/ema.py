"""Bias-corrected EMA of the weights, used for validation and export."""

from copy import deepcopy

import torch
from torch import nn


class Ema:
    """Bias-corrected exponential moving average of a model's weights over steps.

    After t steps with weights w_1 … w_t it is Σ dᵗ⁻ˢ w_s / Σ dᵗ⁻ˢ (the correction of Adam's
    moments, Kingma and Ba 2015, applied to weights). No update waits for the device.

    Args:
        model: The model that is trained.
        decay: d, from 0 to less than 1; 0 keeps no average.

    Attributes:
        model: A copy with the averaged weights; the trained model itself where decay is 0.
        steps: t.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = deepcopy(model).requires_grad_(False) if decay else model
        self.steps = 0
        self._trained, self._decay = model, decay

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the weights after a step."""
        self.steps += 1
        if self._decay:
            share = (1 - self._decay) / (1 - self._decay**self.steps)
            torch._foreach_lerp_(
                list(self.model.parameters()), list(self._trained.parameters()), share
            )
