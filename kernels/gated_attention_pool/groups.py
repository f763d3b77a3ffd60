"""Group short adjacent bags into padded blocks of rows for the CPU kernel."""

from typing import NamedTuple

import torch
from torch import Tensor

from hmil_fast.kernels.bags import Spans


class Group(NamedTuple):
    """Bags that follow one another in x, none empty, in one tile; or one bag of any length.

    Attributes:
        bags: Their numbers.
        rows: Their rows in x.
        places: Where their rows go once every bag is padded to the longest; None if they stay.
        size: Bags, longest.
    """

    bags: slice
    rows: slice
    places: Tensor | None
    size: tuple[int, int]

    def tiles(self, most: int) -> list[slice]:
        """Their rows in tiles of at most so many."""
        start, stop = self.rows.start, self.rows.stop
        return [slice(lo, min(lo + most, stop)) for lo in range(start, stop, most)]

    def pad(self, rows: Tensor, value: float = 0.0) -> Tensor:
        """[rows of the bags or of a tile of one bag, K] → [bags, longest, K]."""
        count, longest = self.size
        if self.places is not None:
            padded = rows.new_full((count * longest, rows.shape[1]), value)
            rows = padded.index_copy_(0, self.places, rows)
        return rows.view(count, -1, rows.shape[1])

    def unpad(self, padded: Tensor) -> Tensor:
        """The rows again: no padding, and nothing of it, is left."""
        rows = padded.flatten(0, 1)
        return rows if self.places is None else rows[self.places]


def grouped(spans: Spans, tile: int, device: torch.device) -> list[Group]:
    """Group bags into tiles of at most `tile` rows; a bag of that or more stays alone."""
    found: list[tuple[int, int, list[int]]] = []  # first bag, first row, lengths
    end = -1  # row after the last group, if the next bag may join it
    for k, (start, length) in enumerate(spans):
        if not length:
            end = -1  # a group's numbers have no gaps
            continue
        lengths = [*found[-1][2], length] if start == end else []
        # padding is cheap beside the gates: allow as much of it as there are rows
        if lengths and sum(lengths) <= tile and len(lengths) * max(lengths) <= 2 * tile:
            found[-1][2].append(length)
        else:
            found.append((k, start, [length]))
        end = start + length
    groups = []
    for first, start, lengths in found:
        count, rows, longest = len(lengths), sum(lengths), max(lengths)
        places = None
        if rows < count * longest:
            gaps = torch.tensor([k * longest for k in range(count)])
            gaps[1:] -= torch.tensor(lengths[:-1]).cumsum(0)
            places = torch.arange(rows) + gaps.repeat_interleave(torch.tensor(lengths))
            places = places.to(device, non_blocking=True)
        groups.append(
            Group(slice(first, first + count), slice(start, start + rows), places, (count, longest))
        )
    return groups
