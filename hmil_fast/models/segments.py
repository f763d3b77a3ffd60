"""Sum, maximum, argmax and order per bag of packed rows, without a loop and without a GPU wait."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hmil_fast.kernels.bags import as_bags, check_bags

_TILE = 128  # rows: enough for a fast matrix product, few beside most bags


class Segments(NamedTuple):
    """Which row belongs to which of B bags.

    Attributes:
        bag: int64 [N], the bag of every row; B for a row in no bag.
        start: int64 [B], the first row of every bag.
        length: int64 [B].
    """

    bag: Tensor
    start: Tensor
    length: Tensor

    @property
    def filled(self) -> Tensor:
        """Tell which bags have rows, bool [B, 1]."""
        return self.length[:, None] > 0

    def spread(self, per_bag: Tensor) -> Tensor:
        """Copy the value of each bag to its rows, [B, C] → [N, C]; 0 for rows in no bag."""
        return torch.cat([per_bag, per_bag.new_zeros(1, per_bag.shape[1])])[self.bag]

    def sum(self, rows: Tensor) -> Tensor:
        """Sum over every bag, [N, C] → [B, C]; 0 for an empty bag."""
        sums = rows.new_zeros(len(self.length) + 1, rows.shape[1])
        return sums.index_add(0, self.bag, rows)[:-1]

    def max(self, rows: Tensor) -> Tensor:
        """Maximum over every bag, [N, C] → [B, C]; 0 for an empty bag."""
        most = rows.new_full((len(self.length) + 1, rows.shape[1]), -torch.inf)
        index = self.bag[:, None].expand(-1, rows.shape[1])
        most = most.scatter_reduce(0, index, rows, "amax")[:-1]
        return torch.where(self.filled, most, 0)

    def argmax(self, rows: Tensor) -> Tensor:
        """First row of every bag's maximum, [N, C] → int64 [B, C]; 0 for an empty bag.

        NaN counts as the largest value, so the row of a bag with NaNs lies in that bag.
        """
        scores = rows.detach().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        row = torch.arange(len(rows), device=rows.device)[:, None].expand_as(rows)
        best = torch.where(scores == self.spread(self.max(scores)), row, len(rows))
        first = row.new_full((len(self.length) + 1, rows.shape[1]), len(rows))
        first = first.scatter_reduce(0, self.bag[:, None].expand_as(rows), best, "amin")
        return torch.where(self.filled, first[:-1], 0)

    def order(self, rows: Tensor) -> Tensor:
        """Sort rows by bag, then by falling value: int64 [N, C]; rows in no bag come last."""
        falling = rows.detach().argsort(dim=0, descending=True, stable=True)
        return falling.gather(0, self.bag[falling].argsort(dim=0, stable=True))

    def tiles(self) -> tuple[Tensor, Tensor, Tensor]:
        """Cut the bags into M ≤ N / T + B tiles of T rows, each inside one bag.

        Returns:
            rows int64 [M, T], inside bool [M, T] (rows is 0 where it is False), and the bag of each
            tile int64 [M], B for an unused tile.
        """
        counts = (self.length + _TILE - 1) // _TILE
        ends = counts.cumsum(0)
        most = len(self.bag) // _TILE + len(counts) if len(counts) else 0
        tile = torch.arange(most, device=self.bag.device)
        bag = torch.searchsorted(ends, tile, right=True)
        known = bag.clamp(max=len(counts) - 1)  # an unused tile begins behind the last bag's rows
        first = (tile - (ends - counts)[known]) * _TILE
        place = first[:, None] + torch.arange(_TILE, device=tile.device)
        inside = place < self.length[known, None]
        return torch.where(inside, place + self.start[known, None], 0), inside, bag


def segments(bags: Tensor, rows: int, device: torch.device) -> Segments:
    """Find the bag of every row.

    Args:
        bags: As `as_bags` takes it, in any order; bags may leave rows out and be empty, not
            overlap. They are checked on the CPU only: reading them from a GPU would wait for it.
        rows: Number of rows N.
        device: Where the rows are.

    Raises:
        ValueError: Wrong type or shape, or a bag that leaves the rows or overlaps another.
    """
    if bags.device.type == "cpu" and not torch.compiler.is_compiling():
        spans = sorted(span for span in check_bags(bags, rows) if span[1])
        for (first, rows_there), (after, _) in pairwise(spans):
            if first + rows_there > after:
                raise ValueError(
                    f"the bags that begin at rows {first} and {after} overlap; give this model "
                    "bags of rows of their own"
                )
    start, length = as_bags(bags).to(device, non_blocking=True).unbind(1)
    number = torch.arange(1, len(start) + 1, device=device)
    steps = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    steps = steps.index_add(0, start, number).index_add(0, start + length, -number)
    bag = steps.cumsum(0)[:-1] - 1
    return Segments(torch.where(bag < 0, len(start), bag), start, length)
