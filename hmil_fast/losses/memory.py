"""Memory of embeddings from earlier steps: a rare leaf then has positives in every step."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Past(NamedTuple):
    """Content of a memory: Q rows, some of which may be empty.

    Attributes:
        rows: [Q, E].
        leaf: int64 [Q].
        filled: bool [Q].
    """

    rows: Tensor
    leaf: Tensor
    filled: Tensor


class Memory(nn.Module):
    """The latest slides of every leaf, a detached row each; per leaf a queue, first in, first out.

    The cross-batch memory of Wang et al. (CVPR 2020), kept per leaf so that frequent leaves do not
    push out rare ones. It is part of the state dict, so a resumed run continues with the same rows.

    Args:
        leaves: Number of leaves K.
        size: Slides per leaf M.

    Attributes:
        rows: [K, M, E], in rotation; E is 0 until the first rows come.
        count: int64 [K], how many slides of the leaf have come so far.
    """

    rows: Tensor
    count: Tensor

    def __init__(self, leaves: int, size: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(leaves, size, 0))
        self.register_buffer("count", torch.zeros(leaves, dtype=torch.int64))

    def recall(self, like: Tensor) -> Past:
        """Return all rows, as wide as `like` [R, E]; Q = K·M, leaf by leaf."""
        leaves, size, width = self.rows.shape
        if not width:
            self.rows = like.new_zeros(leaves, size, like.shape[1])
        slot = torch.arange(size, device=self.count.device)
        leaf = torch.arange(leaves, device=self.count.device).repeat_interleave(size)
        return Past(self.rows.flatten(0, 1), leaf, (slot < self.count[:, None]).flatten())

    def remember(self, rows: Tensor, leaf: Tensor) -> None:
        """Put slides into the queues of their leaves; call `recall` before.

        Slides of one step have no order in time: they go in by their first entry, so that the same
        ones stay however processes have shared the step. Of more than a queue holds, those stay
        that stand evenly in this order: the last would all lie to one side.

        Args:
            rows: [B, E].
            leaf: int64 [B].
        """
        if not len(rows):
            return
        leaves, size, _ = self.rows.shape
        order = rows.detach()[:, 0].argsort(stable=True)
        order = order[leaf[order].argsort(stable=True)]
        numbers = torch.arange(leaves, device=leaf.device)
        first = torch.searchsorted(leaf[order], numbers)
        new = torch.searchsorted(leaf[order], numbers, right=True) - first
        self.count = self.count + new
        # of the new slides of a leaf, the last one that falls on a slot
        slot = torch.arange(size, device=leaf.device)
        last = new[:, None] - 1 - (self.count[:, None] - 1 - slot) % size
        over = new[:, None] - size
        even = (2 * (last - over) + 1) * new[:, None] // (2 * size)
        chosen = first[:, None] + torch.where(over > 0, even, last)
        source = order[chosen.clamp(0, len(rows) - 1)]
        # a new tensor: the step that has just read the old one still needs it for its gradient
        self.rows = torch.where((last >= 0)[:, :, None], rows.detach()[source], self.rows)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}rows" in state_dict:  # the width is known to the rows only
            rows = state_dict[f"{prefix}rows"]
            if rows.shape[:2] == self.rows.shape[:2]:
                self.rows = torch.empty_like(rows, device=self.rows.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
