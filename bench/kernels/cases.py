"""List the cases of the kernels' benchmark: op, sizes and order."""

import os
from dataclasses import dataclass

import torch

_PLAIN = ("core", "hmil", "pool")  # in the order of what they tell


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        family: "hmil" (W1, both levels, classifiers), "core" (its pooling after the fold), "pool"
            (attention on features), "alignment" or "supcon".
        phase: "forward", or "step": forward and backward.
        dtype: "fp32", "tf32" or "bf16".
        rows: Instances of all bags, or rows of SupCon.
        bags: Among which they are divided.
    """

    family: str
    phase: str
    dtype: str
    rows: int
    bags: int

    def __str__(self) -> str:
        return f"{self.family}-{self.phase}-{self.dtype}-{self.rows}x{self.bags}"

    @property
    def group(self) -> tuple[str, str, str]:
        """Cases that share weights and compiled functions."""
        return self.family, self.phase, self.dtype

    def lengths(self) -> list[int]:
        """Instances per bag, from a quarter to seven quarters of the mean; they add up to rows."""
        if self.bags == 1:
            return [self.rows]
        share = torch.linspace(0.25, 1.75, self.bags, dtype=torch.float64) / self.bags
        order = torch.randperm(self.bags, generator=torch.Generator().manual_seed(0))
        ends = (self.rows * share[order].cumsum(0)).round().long()
        return torch.diff(ends, prepend=ends.new_zeros(1)).tolist()


def grid(full: bool, kind: str) -> list[Case]:
    """All cases of a machine, the most telling first: a time budget may cut the list short.

    Args:
        full: On a CPU too, up to a million instances.
        kind: "cuda" or "cpu".
    """
    gpu = kind == "cuda"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _cases("bf16", [40], [3]) + _cases("fp32", [40], [1], ("alignment", "supcon"))
    sizes = [1_000_000, 100_000, 10_000, 1000]
    if gpu:
        found = _cases("bf16", sizes, [1, 64])
        found += _cases("fp32", sizes, [1, 64], ("alignment",))
        found += _cases("tf32", [448, 4096, 16_384, 65_536], [1], ("supcon",))
        for dtype in ("tf32", "fp32"):
            found += _cases(dtype, [1_000_000, 100_000], [1])
        return found + _cases("fp32", [4096, 16_384], [1], ("supcon",))
    if full:
        found = _cases("fp32", sizes[::-1], [1, 64], (*_PLAIN, "alignment"))
        return found + _cases("fp32", [448, 4096, 16_384, 65_536], [1], ("supcon",))
    found = _cases("fp32", [10_000], [1, 64], ("hmil",)) + _cases("fp32", [10_000], [1])[:2]
    found += _cases("fp32", [10_000], [64], ("pool", "alignment"))
    return found + _cases("fp32", [448, 4096], [1], ("supcon",))


def _cases(
    dtype: str, sizes: list[int], bags: list[int], families: tuple[str, ...] = _PLAIN
) -> list[Case]:
    return [
        Case(family, phase, dtype, rows, count)
        for family in families
        for phase in ("forward", "step")
        for rows in sizes
        for count in bags
    ]
