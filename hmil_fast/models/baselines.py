"""Baselines without attention: mean pooling and max pooling."""

import torch
from torch import Tensor, nn

from hmil_fast.models.inputs import cast, check_sizes, features
from hmil_fast.models.output import HmilOutput
from hmil_fast.models.segments import segments


class _TwoLayers(nn.Module):
    """A hidden layer, and a head per level."""

    def __init__(self, dim: int, num_classes: tuple[int, ...], *, hidden: int = 256) -> None:
        super().__init__()
        check_sizes(dim, num_classes, hidden)
        self.first = nn.Linear(dim, hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, classes) for classes in num_classes)

    def _predict(self, hidden: Tensor) -> HmilOutput:
        return HmilOutput(tuple(head(hidden) for head in self.heads), (), (), None)


class MeanPool(_TwoLayers):
    """A two-layer perceptron on the mean feature of the bag, one head per level (after SiMLP).

    Args:
        dim: Feature dimension D.
        num_classes: Nodes per level of the label tree, coarse first.
        hidden: Width of the hidden layer.
    """

    def forward(self, x: Tensor, bags: Tensor, targets: Tensor | None = None) -> HmilOutput:
        """Predict packed bags; arguments as for `HMIL.forward`. The mean of an empty bag is 0."""
        with torch.autocast(x.device.type, enabled=False):
            x = cast(features(x, self.first.in_features), self.first.weight)
            parts = segments(bags, x.shape[0], x.device)
            means = parts.sum(x) / parts.length.clamp_min(1)[:, None]
            return self._predict(torch.relu(self.first(means)))


class MaxPool(_TwoLayers):
    """The largest value of every hidden unit over the bag, one head per level.

    h_i = ReLU(W x_i + b); the bag is max_i h_i ("embedding + max" in Ilse et al. 2018). Arguments
    as for `MeanPool`.
    """

    def forward(self, x: Tensor, bags: Tensor, targets: Tensor | None = None) -> HmilOutput:
        """Predict packed bags; arguments as for `HMIL.forward`. An empty bag has maxima of 0."""
        x = cast(features(x, self.first.in_features), self.first.weight)
        parts = segments(bags, x.shape[0], x.device)
        # ReLU is monotonic: ReLU of the maximum is the maximum of the ReLUs
        largest = parts.max(self.first(x))
        with torch.autocast(x.device.type, enabled=False):
            hidden = torch.relu(largest.to(self.first.weight.dtype))
            return self._predict(hidden)
