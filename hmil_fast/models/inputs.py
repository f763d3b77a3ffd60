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


def features(x: Tensor, dim: int) -> Tensor:
    """`x` if it is [N, dim]; one row, in no bag, if it has none.

    Raises:
        ValueError: It is not.
    """
    if x.ndim != 2 or x.shape[1] != dim:
        raise ValueError(f"x has shape {list(x.shape)}; give [N, {dim}]")
    return x if x.shape[0] else x.new_zeros(1, dim)  # an empty matrix has no row to point at


def cast(x: Tensor, weight: Tensor) -> Tensor:
    """`x` in the dtype of the weights it meets, unless autocast sees to that."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
