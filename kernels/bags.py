"""Bags as slices of a row-major tensor: the (start, length) pairs that every op takes."""

import torch
from torch import Tensor

Spans = list[tuple[int, int]]


def check_bags(bags: Tensor, rows: int) -> Spans:
    """Check `bags` and return it as Python pairs.

    Args:
        bags: int64 [B, 2], the (start, length) of each bag; keep it on the CPU, where reading it
            makes no accelerator wait.
        rows: Number of rows that the bags may point into.

    Raises:
        ValueError: Wrong type or shape, or a bag that leaves the rows.
    """
    if bags.dtype != torch.int64 or bags.ndim != 2 or bags.shape[1] != 2:
        raise ValueError(
            f"bags must be int64 [B, 2], one (start, length) per bag, but is "
            f"{bags.dtype} {list(bags.shape)}; build it with torch.tensor(pairs, dtype=torch.int64)"
        )
    spans: Spans = [(start, length) for start, length in bags.tolist()]
    for k, (start, length) in enumerate(spans):
        if start < 0 or length < 0 or start + length > rows:
            raise ValueError(
                f"bags[{k}] = ({start}, {length}) leaves the {rows} rows; "
                "give start ≥ 0, length ≥ 0 and start + length ≤ rows"
            )
    return spans


def bag_rows(spans: Spans, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row numbers of all bags one after another, and the bag that each belongs to.

    Returns:
        Two int64 tensors [sum of lengths].
    """
    lengths = torch.tensor([length for _, length in spans], dtype=torch.int64)
    starts = torch.tensor([start for start, _ in spans], dtype=torch.int64)
    total = int(lengths.sum())
    bag = torch.repeat_interleave(torch.arange(len(spans)), lengths, output_size=total)
    first = lengths.cumsum(0) - lengths
    rows = torch.arange(total) + (starts - first)[bag]
    return rows.to(device, non_blocking=True), bag.to(device, non_blocking=True)
