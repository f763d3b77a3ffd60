"""Supervised contrastive loss (Khosla et al. 2020, eq. 2)."""

import math

import torch
from torch import Tensor

from hmil_fast.kernels.supcon.gather import gather_rows
from hmil_fast.kernels.supcon.op import supcon_lse

__all__ = ["gather_rows", "supcon"]


def supcon(z: Tensor, labels: Tensor, temperature: float, *, eps: float = 0.0) -> Tensor:
    """Supervised contrastive loss, averaged over the anchors that have a positive.

    Per anchor i with positives P(i) (other rows of its label, any number of them):
    −1/|P(i)| Σ_{p ∈ P(i)} [z_i·z_p/τ − log Σ_{a ≠ i} exp(z_i·z_a/τ)].

    Memory is O(R·D): the sums go tile by tile, and Σ_p z_i·z_p = z_i·(Σ of its label − z_i).

    Args:
        z: [R, D], L2-normalised rows.
        labels: int64 [R], or [R, L] for L losses (levels of the label tree) that share the sums.
        temperature: τ > 0.
        eps: Added to Σ exp((z_i·z_a − 1)/τ) inside the logarithm and to |P(i)|; 1e-6 in the code
            that the authors of HMIL released, 0 in the paper.

    Returns:
        A scalar, or [L]; float32 (float64 if z is); 0 with zero gradient if no anchor has a
        positive. Differentiable once.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, a temperature that is not finite and
            above 0, or an eps that is not finite and at least 0.
    """
    _check(z, labels, temperature, eps)
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        log_sum = supcon_lse(z, temperature)
        if eps:
            shifted = log_sum.new_tensor(math.log(eps) + 1 / temperature)
            log_sum = torch.logaddexp(log_sum, shifted)
        if labels.ndim == 1:
            return _level(z, labels, log_sum, temperature, eps)
        levels = [_level(z, level, log_sum, temperature, eps) for level in labels.unbind(1)]
        return torch.stack(levels) if levels else z.new_zeros(0)


def _level(z: Tensor, labels: Tensor, log_sum: Tensor, temperature: float, eps: float) -> Tensor:
    labels = labels.contiguous()
    ordered = labels.sort().values
    first = torch.searchsorted(ordered, labels)  # one number per label, below R
    positives = (torch.searchsorted(ordered, labels, right=True) - first - 1).to(z.dtype)
    anchor = positives > 0
    share = torch.where(anchor, 1 / (positives.clamp_min(1) + eps), 0)
    # rows of a label have one share c, so Σ_i c z_i·(S − z_i) = |Σ_i √c z_i|² − Σ_i c |z_i|²
    pull = _sums(z * share.sqrt()[:, None], first).square().sum() - share @ z.square().sum(1)
    push = (share * positives) @ log_sum
    return (push - pull / temperature) / anchor.sum().clamp_min(1)


def _sums(rows: Tensor, group: Tensor) -> Tensor:
    """Sums of the rows of each group, at the group's number; in a fixed order."""
    sums = torch.zeros_like(rows)
    if rows.is_cuda:  # where index_add is atomic and this is not
        return sums.index_put((group,), rows, accumulate=True)
    return sums.index_add(0, group, rows)


def _check(z: Tensor, labels: Tensor, temperature: float, eps: float) -> None:
    if z.ndim != 2 or not z.is_floating_point():
        raise ValueError(f"z is {z.dtype} {list(z.shape)}; give a float matrix, one row per view")
    if labels.dtype != torch.int64 or labels.ndim not in (1, 2) or labels.shape[0] != z.shape[0]:
        raise ValueError(
            f"labels is {labels.dtype} {list(labels.shape)}; give int64 [{z.shape[0]}], one per "
            f"row, or [{z.shape[0]}, L], one per row and level"
        )
    if labels.device != z.device:
        raise ValueError(f"labels is on {labels.device}, z on {z.device}; move labels there")
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature is {temperature}; give a finite number above 0, for instance 0.1"
        )
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}; give a finite number of at least 0, for instance 1e-6")
