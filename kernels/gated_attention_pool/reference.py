"""Gated attention pooling in plain torch, for tests and for dropout under torch.compile."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hmil_fast.kernels.bags import Spans


def pool_reference(
    x: Tensor, weights: list[Tensor], spans: Spans, dropout: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_attention_pool` for weights [V, bv, U, bu, Wc, bc], by autograd, in their dtype."""
    V, bv, U, bu, Wc, bc = weights
    inside = torch.zeros(x.shape[0], dtype=torch.bool)
    for start, length in spans:
        inside[start : start + length] = True
    rows = inside.nonzero().squeeze(1).to(x.device)
    h = x[rows]
    gated = torch.tanh(F.linear(h, V, bv)) * torch.sigmoid(F.linear(h, U, bu))  # [rows, H]
    scores = F.linear(F.dropout(gated, dropout), Wc, bc)  # [rows, C]
    logits = x.new_zeros(x.shape[0], Wc.shape[0]).index_copy(0, rows, scores)

    pooled, lse = [], []
    for start, length in spans:
        if not length:
            pooled.append(x.new_zeros(Wc.shape[0], x.shape[1]))
            lse.append(x.new_full((Wc.shape[0],), -torch.inf))
            continue
        s = logits[start : start + length]  # [n, C]
        lse.append(torch.logsumexp(s, dim=0))
        pooled.append(torch.softmax(s, dim=0).T @ x[start : start + length])  # [C, D]
    if not spans:
        return x.new_zeros(0, Wc.shape[0], x.shape[1]), x.new_zeros(0, Wc.shape[0]), logits
    return torch.stack(pooled), torch.stack(lse), logits
