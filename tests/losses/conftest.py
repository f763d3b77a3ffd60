"""A depth-3 tree with a leaf on every level and a single child, and outputs drawn for it."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hmil_fast.labels import LabelTree

# n and micro stand higher than the other leaves; end is a single child
UNEVEN = LabelTree.from_nested(
    {"n": None, "p": {"micro": None, "macro": ["large", "small"], "only": ["end"]}}
)


class Output(NamedTuple):
    logits: tuple[Tensor, ...]
    attention_logits: tuple[Tensor, ...]
    lse: tuple[Tensor, ...]
    embeddings: Tensor | None


class Batch(NamedTuple):
    output: Output
    bags: Tensor
    targets: Tensor


def draw_batch(leaves: list[int], seed: int = 0, tree: LabelTree = UNEVEN) -> Batch:
    """Float64 outputs for bags of one to four instances with these leaves."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    lengths = torch.tensor([1 + i % 4 for i in range(len(leaves))], dtype=torch.int64)
    bags = torch.stack([lengths.cumsum(0) - lengths, lengths], 1)
    attention = tuple(draw(int(lengths.sum()), k) for k in tree.num_classes)
    lse = tuple(
        torch.stack([a[s : s + n].logsumexp(0) for s, n in bags.tolist()])
        if leaves
        else a.new_zeros(0, a.shape[1])
        for a in attention
    )
    rows = torch.nn.functional.normalize(draw(len(leaves), tree.num_classes[-1], 6), dim=2)
    logits = tuple(draw(len(leaves), k) for k in tree.num_classes)
    targets = torch.from_numpy(tree.ancestors()).T[torch.tensor(leaves, dtype=torch.int64)]
    return Batch(Output(logits, attention, lse, rows), bags, targets)


@pytest.fixture
def uneven() -> LabelTree:
    return UNEVEN


@pytest.fixture
def batch() -> Callable[..., Batch]:
    return draw_batch
