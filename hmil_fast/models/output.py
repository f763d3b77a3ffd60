"""What every model returns."""

from typing import NamedTuple

from torch import Tensor


class HmilOutput(NamedTuple):
    """Predictions for B bags of N instances in all; tuples have one entry per level, coarse first.

    Attributes:
        logits: [B, K_l] per level.
        attention_logits: [N, K_l] per level; the attention of instance i in bag b is
            exp(attention_logits[l][i] − lse[l][b]). Empty for a model without attention.
        lse: [B, K_l] per level, −inf for an empty bag. Empty for a model without attention.
        embeddings: [B, K, E], one L2-normalised row per class of the finest level (a row of zeros
            stays zero), or None.
        auxiliary: Scalar loss of the model's own, weighted, to add to the training loss; or None.
    """

    logits: tuple[Tensor, ...]
    attention_logits: tuple[Tensor, ...]
    lse: tuple[Tensor, ...]
    embeddings: Tensor | None
    auxiliary: Tensor | None = None
