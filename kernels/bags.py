"""Check and convert bags: (start, length) pairs into the rows of a packed tensor."""

import torch
from torch import Tensor

Spans = list[tuple[int, int]]


def as_bags(bags: Tensor) -> Tensor:
    """`bags` as int64 [B, 2]; without a look at its values, so a part of any graph.

    Args:
        bags: int64 or int32; [B, 2], the (start, length) of each bag, or [B + 1], the bounds of
            bags that follow one another (`cu_seqlens` of other packed kernels). Keep it on the
            CPU, where reading it makes no accelerator wait.

    Raises:
        ValueError: Neither of these.
    """
    pairs = bags.ndim == 2 and bags.shape[1] == 2
    bounds = bags.ndim == 1 and bags.shape[0] > 0
    if bags.dtype not in (torch.int64, torch.int32) or not (pairs or bounds):
        raise ValueError(
            f"bags is {bags.dtype} {list(bags.shape)}; give int64 [B, 2], one (start, length) per "
            "bag, for instance torch.tensor(pairs), or the B + 1 bounds of bags in a row"
        )
    bags = bags.long()
    return bags if pairs else torch.stack([bags[:-1], bags.diff()], 1)


def check_bags(bags: Tensor, rows: int) -> Spans:
    """Check `bags`, as `as_bags` takes it, and return it as Python pairs.

    Args:
        bags: The (start, length) of each bag.
        rows: Number of rows that the bags may point into.

    Raises:
        ValueError: Wrong type or shape, or a bag that leaves the rows.
    """
    spans: Spans = [(start, length) for start, length in as_bags(bags).tolist()]
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
