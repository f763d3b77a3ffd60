"""Supervised contrastive loss over the class-wise embeddings of the finest level."""

from torch import Tensor

from hmil_fast.kernels.supcon import gather_rows, supcon


def contrastive(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """SupCon over the B·K rows of a batch; all rows of a bag carry its leaf label.

    Where a process group is set up, B counts the bags of all ranks and every rank gets the same
    value; see `gather_rows` for the gradient.

    Args:
        embeddings: [B, K, E], L2-normalised rows.
        labels: int64 [B], leaf per bag.
        temperature: τ > 0.
    """
    embeddings, labels = gather_rows(embeddings, labels)
    return supcon(*_rows(embeddings, labels), temperature)


def contrastive_released(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The same as in the authors' code: 1e-6 in its denominators, × τ/0.1, divided by B once more.

    Arguments as for `contrastive`.
    """
    embeddings, labels = gather_rows(embeddings, labels)
    loss = supcon(*_rows(embeddings, labels), temperature, eps=1e-6)
    return loss * (temperature / 0.1 / max(len(labels), 1))


def _rows(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return embeddings.flatten(0, 1), labels.repeat_interleave(
        embeddings.shape[1], output_size=embeddings.shape[0] * embeddings.shape[1]
    )
