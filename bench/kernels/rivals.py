"""The formulas in plain torch, written here, that the kernels are compared with.

Rows are embedded and scored packed, for all bags in one product; softmax and weighted sums then run
bag by bag. That is the stronger of the ways to write it without kernels: "by bag" does everything
one bag after another, as the published code does, and "padded" pads bags to the longest.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmil_fast.models.hmil import HMIL

Scored = list[tuple[Tensor, Tensor]]  # per level: scores [..., N, C], rows [..., N, D]


class GatedPool(nn.Module):
    """The weights of one gated attention, D → H → C."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        dim, hidden, classes = shape
        self.V = nn.Linear(dim, hidden)
        self.U = nn.Linear(dim, hidden)
        self.w = nn.Linear(hidden, classes)

    def weights(self) -> tuple[Tensor, ...]:
        """In the order of `gated_attention_pool`."""
        return tuple(t for part in (self.V, self.U, self.w) for t in (part.weight, part.bias))

    def forward(self, x: Tensor) -> Scored:
        """Score rows [..., N, D]."""
        return [(self.w(torch.tanh(self.V(x)) * torch.sigmoid(self.U(x))), x)]


def unfolded(model: HMIL, x: Tensor) -> Scored:
    """Every level of HMIL from its own h, which is made."""
    h = F.relu(model.reduce(x))
    found = []
    for level in model.levels:
        h = level.embed(h)
        gated = torch.tanh(level.V(h)) * torch.sigmoid(level.U(h))
        found.append((level.w(gated), h))
    return found


def folded(model: HMIL, x: Tensor) -> tuple[Scored, list[tuple[Tensor, Tensor]]]:
    """All levels from r at once, and the maps from pooled r to pooled h."""
    r = F.relu(model.reduce(x))
    maps: list[tuple[Tensor, Tensor]] = []
    gates: list[list[Tensor]] = []
    for level in model.levels:
        A, c = level.embed.weight, level.embed.bias
        if maps:
            A, c = A @ maps[-1][0], A @ maps[-1][1] + c
        maps.append((A, c))
        V, U = level.V, level.U
        gates.append([V.weight @ A, V.weight @ c + V.bias, U.weight @ A, U.weight @ c + U.bias])
    V, bv, U, bu = (torch.cat(parts) for parts in zip(*gates, strict=True))
    w = torch.block_diag(*(level.w.weight for level in model.levels))
    b = torch.cat([level.w.bias for level in model.levels])
    gated = torch.tanh(F.linear(r, V, bv)) * torch.sigmoid(F.linear(r, U, bu))
    return [(F.linear(gated, w, b), r)], maps


def pooled(scored: Scored, lengths: list[int]) -> list[Tensor]:
    """[B, C, D] per level; one bag is not cut, so that a compiler sees one graph of any length."""
    means = []
    for scores, rows in scored:
        s = [scores] if len(lengths) == 1 else scores.split(lengths)
        h = [rows] if len(lengths) == 1 else rows.split(lengths)
        bags = [torch.softmax(a, 0).T.to(b.dtype) @ b for a, b in zip(s, h, strict=True)]
        means.append(torch.stack(bags))
    return means


def pooled_padded(scored: Scored, mask: Tensor) -> list[Tensor]:
    """[B, C, D] per level of bags padded to one length; mask [B, L, 1] is true on rows."""
    means = []
    for scores, rows in scored:
        attention = torch.softmax(scores.masked_fill(~mask, -torch.inf), 1)
        means.append(attention.mT.to(rows.dtype) @ rows)
    return means


def mapped(
    means: list[Tensor], maps: list[tuple[Tensor, Tensor]], sizes: tuple[int, ...]
) -> list[Tensor]:
    """Pooled h of every level from pooled r of all."""
    parts = means[0].split(list(sizes), 1)
    return [F.linear(p, A, c) for p, (A, c) in zip(parts, maps, strict=True)]


def classified(model: HMIL, means: list[Tensor]) -> list[Tensor]:
    """Logits [B, K] per level."""
    return [
        level.classify(mean).squeeze(2) for level, mean in zip(model.levels, means, strict=True)
    ]


def pad(x: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Bags padded to the longest [B, L, D], and where their rows are [B, L, 1]."""
    padded = nn.utils.rnn.pad_sequence(list(x.detach().split(lengths)), batch_first=True)
    own = torch.tensor(lengths)[:, None] > torch.arange(padded.shape[1])
    return padded, own.to(x.device)[:, :, None]


def alignment(
    levels: tuple[Tensor, Tensor, Tensor, Tensor], children: Tensor, bag: Tensor | None, bags: int
) -> Tensor:
    """1 − torch's cosine between coarse attention and the children's sums, mean over each bag."""
    coarse, coarse_lse, fine, fine_lse = levels
    if bag is None:
        above, below = torch.exp(coarse - coarse_lse), torch.exp(fine - fine_lse)
    else:
        above, below = torch.exp(coarse - coarse_lse[bag]), torch.exp(fine - fine_lse[bag])
    apart = 1 - F.cosine_similarity(above, below @ children, dim=1)
    if bag is None:
        return apart.mean()[None]
    sizes = torch.zeros_like(apart[:bags]).index_add(0, bag, torch.ones_like(apart))
    return torch.zeros_like(apart[:bags]).index_add(0, bag, apart) / sizes
