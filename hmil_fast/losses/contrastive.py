"""Supervised contrastive loss over the class-wise embeddings of the finest level."""

from torch import Tensor

from hmil_fast.kernels.supcon import supcon


def contrastive(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """SupCon over the B·K rows of a batch; all rows of a bag carry its leaf label.

    Args:
        embeddings: [B, K, E], L2-normalised rows.
        labels: int64 [B], leaf per bag.
        temperature: τ > 0.
    """
    rows, views = _rows(embeddings, labels)
    return supcon(rows, views, temperature)


def contrastive_released(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The same as in the authors' code: 1e-6 in its denominators, × τ/0.1, divided by B once more.

    Arguments as for `contrastive`.
    """
    rows, views = _rows(embeddings, labels)
    loss = supcon(rows, views, temperature, eps=1e-6)
    return loss * (temperature / 0.1 / max(len(labels), 1))


def _rows(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return embeddings.flatten(0, 1), labels.repeat_interleave(
        embeddings.shape[1], output_size=embeddings.shape[0] * embeddings.shape[1]
    )
