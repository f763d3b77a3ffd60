"""Checks that all models make of their settings and features."""

import torch
from torch import Tensor


def check_sizes(dim: int, num_classes: tuple[int, ...], hidden: int, dropout: float = 0.0) -> None:
    """Check the sizes of a model.

    Raises:
        ValueError: A size is not positive, or dropout is not in [0, 1).
    """
    if dim < 1 or hidden < 1 or not num_classes or min(num_classes) < 1:
        raise ValueError(
            f"dim is {dim}, num_classes {num_classes}, hidden {hidden}; give positive numbers "
            "and at least one level"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; give a probability in [0, 1)")


def features(x: Tensor, dim: int) -> Tensor:
    """Check that `x` is [N, dim] and return it; for N = 0 return one row of zeros, in no bag.

    Raises:
        ValueError: `x` has another shape.
    """
    if x.ndim != 2 or x.shape[1] != dim:
        raise ValueError(f"x has shape {list(x.shape)}; give [N, {dim}]")
    return x if x.shape[0] else x.new_zeros(1, dim)  # kernels need the address of a row


def cast(x: Tensor, weight: Tensor) -> Tensor:
    """Convert `x` to the dtype of `weight`, unless autocast does that."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
