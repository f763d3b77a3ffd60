"""Supervised contrastive loss (Khosla et al. 2020, eq. 2)."""

import torch
from torch import Tensor

from hmil_fast.kernels.supcon.reference import supcon_reference

__all__ = ["supcon"]


def supcon(z: Tensor, labels: Tensor, temperature: float, *, eps: float = 0.0) -> Tensor:
    """Supervised contrastive loss, averaged over the anchors that have a positive.

    Per anchor i with positives P(i) (other rows of its label):
    −1/|P(i)| Σ_{p ∈ P(i)} [z_i·z_p/τ − log Σ_{a ≠ i} exp(z_i·z_a/τ)].

    Args:
        z: [R, D], L2-normalised rows.
        labels: int64 [R].
        temperature: τ > 0.
        eps: Added to Σ exp((z_i·z_a − 1)/τ) inside the logarithm and to |P(i)|; 1e-6 in the code
            that the authors of HMIL released, 0 in the paper.

    Returns:
        A scalar, float32 (float64 if z is); 0 with zero gradient if no anchor has a positive.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or a temperature that is not above 0.
    """
    if z.ndim != 2 or not z.is_floating_point():
        raise ValueError(f"z is {z.dtype} {list(z.shape)}; give a float matrix, one row per view")
    if labels.dtype != torch.int64 or list(labels.shape) != [z.shape[0]]:
        raise ValueError(
            f"labels is {labels.dtype} {list(labels.shape)}; give int64 [{z.shape[0]}], one per row"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; give a number above 0, for instance 0.1")
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        return supcon_reference(z, labels, temperature, eps)
