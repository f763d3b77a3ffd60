"""All-gather of embeddings and labels over the ranks, for SupCon over all of them."""

from torch import Tensor

from hmil_fast.kernels.gather import gather


def gather_rows(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Put the rows and labels of all ranks one after another, in the order of the ranks.

    Args:
        z: [R, ...]; see `hmil_fast.kernels.gather` for what may differ between ranks, and for the
            gradient.
        labels: int64, one row per row of z.

    Returns:
        z [ΣR, ...] and labels of all ranks; both as given where no process group of more than one
        rank is set up.

    Raises:
        ValueError: labels has not as many rows as z.
    """
    if labels.shape[0] != z.shape[0]:
        raise ValueError(
            f"labels has {labels.shape[0]} rows, z {z.shape[0]}; give one label per row"
        )
    z, labels = gather(z, labels)
    return z, labels
