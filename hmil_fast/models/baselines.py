"""Baselines without attention: what a hierarchical gain must be told from."""

import torch
from torch import Tensor, nn

from hmil_fast.kernels.bags import check_bags
from hmil_fast.models.output import HmilOutput


class MeanPool(nn.Module):
    """A two-layer perceptron on the mean feature of the bag, one head per level (after SiMLP).

    Args:
        dim: Feature dimension D.
        num_classes: Nodes per level of the label tree, coarse first.
        hidden: Width of the hidden layer.
    """

    def __init__(self, dim: int, num_classes: tuple[int, ...], *, hidden: int = 256) -> None:
        super().__init__()
        if dim < 1 or hidden < 1 or not num_classes or min(num_classes) < 1:
            raise ValueError(
                f"dim is {dim}, num_classes {num_classes}, hidden {hidden}; give positive numbers "
                "and at least one level"
            )
        self.dim = dim
        self.first = nn.Linear(dim, hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, classes) for classes in num_classes)

    def forward(self, x: Tensor, bags: Tensor, targets: Tensor | None = None) -> HmilOutput:
        """Predict packed bags; arguments as for `HMIL.forward`. The mean of an empty bag is 0."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x has shape {list(x.shape)}; give [N, {self.dim}]")
        dtype = self.first.weight.dtype
        means = [
            x[start : start + length].mean(0, dtype=dtype)
            if length
            else x.new_zeros(self.dim, dtype=dtype)
            for start, length in check_bags(bags, x.shape[0])
        ]
        pooled = torch.stack(means) if means else x.new_zeros(0, self.dim, dtype=dtype)
        with torch.autocast(x.device.type, enabled=False):
            hidden = torch.relu(self.first(pooled))
            return HmilOutput(tuple(head(hidden) for head in self.heads), (), (), None)
