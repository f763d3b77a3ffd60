"""What every model checks of its settings and features."""

import torch
from torch import Tensor


def check_sizes(dim: int, num_classes: tuple[int, ...], hidden: int, dropout: float = 0.0) -> None:
    """Refuse sizes that no model can have.

    Raises:
        ValueError: Which.
    """
    if dim < 1 or hidden < 1 or not num_classes or min(num_classes) < 1:
        raise ValueError(
            f"dim is {dim}, num_classes {num_classes}, hidden {hidden}; give positive numbers "
            "and at least one level"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; give a probability in [0, 1)")


def features(x: Tensor, weight: Tensor) -> Tensor:
    """`x` as a model with this first weight [·, D] takes it; one row in no bag if it has none.

    Raises:
        ValueError: x is no [N, D] matrix.
    """
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)}; give [N, {weight.shape[1]}]")
    if not x.shape[0]:  # an empty matrix has no row to point at
        x = x.new_zeros(1, x.shape[1])
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
