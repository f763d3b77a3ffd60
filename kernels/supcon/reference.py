"""The supervised contrastive loss in plain torch, with the [R, R] matrix in memory."""

import torch
from torch import Tensor


def supcon_reference(z: Tensor, labels: Tensor, temperature: float, eps: float) -> Tensor:
    """What `supcon` computes, in the dtype of z."""
    own = torch.eye(z.shape[0], dtype=torch.bool, device=z.device)
    same = (labels[:, None] == labels[None, :]) & ~own
    # unit rows: no entry exceeds 1/τ, so shifting by it is safe and the same for every row
    logits = (z @ z.T - 1) / temperature
    if eps:
        log_sum = torch.log(torch.exp(logits).masked_fill(own, 0).sum(1) + eps)
    elif len(z) > 1:
        log_sum = torch.logsumexp(logits.masked_fill(own, -torch.inf), dim=1)
    else:
        log_sum = z.new_zeros(len(z))
    positives = same.sum(1).to(z.dtype)
    log_p = torch.where(same, logits, 0).sum(1) - positives * log_sum
    pull = torch.where(positives > 0, log_p / (positives.clamp_min(1) + eps), 0)
    return -pull.sum() / (positives > 0).sum().clamp_min(1)
