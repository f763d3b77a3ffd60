"""Hierarchy alignment in chunks of instances, whatever bags they belong to.

What a chunk works with is small beside the logits, and many short bags cost as few operations as
one long bag. Classes come first in a chunk: sums over few classes are then sums of long rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hmil_fast.kernels.bags import Spans, bag_rows
from hmil_fast.kernels.tiles import overlap

_CHUNK = 1 << 15  # instances
_ALONE = 1 << 13  # a bag of more is a chunk by itself: no row needs to be told its bag

Level = tuple[Tensor, Tensor]  # logits [N, C], lse [B, C]


def alignment_streaming(
    coarse: Level, fine: Level, parent: Tensor, spans: Spans, average: bool
) -> Tensor:
    """`hierarchy_alignment` without autograd, in the dtype of the logits."""
    logits, lse = coarse
    total = lse.new_zeros(len(lse), dtype=torch.float64)  # a million terms stay exact
    weights = _weights(parent, logits, average)
    for chunk in _chunks(spans, logits.device):
        both = _compare(coarse, fine, chunk, weights)
        chunk.add_to(total[:, None], both.apart[None])
    return (total / _sizes(spans, total)).to(logits.dtype)


def alignment_streaming_backward(
    grad: Tensor, coarse: Level, fine: Level, parent: Tensor, spans: Spans, average: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for the coarse logits and lse and the fine logits and lse."""
    levels = coarse, fine
    # rows of a single bag are written once, those in several are added up
    once = not overlap(spans)
    whole = once and sum(length for _, length in spans) == len(coarse[0])
    new = torch.empty_like if whole else torch.zeros_like
    d_logits = [new(level[0], memory_format=torch.contiguous_format) for level in levels]
    d_lse = [torch.zeros_like(level[1], dtype=torch.float64) for level in levels]
    weights = _weights(parent, coarse[0], average)
    share = grad / _sizes(spans, grad)
    for chunk in _chunks(spans, grad.device):
        rows = chunk.rows
        a, s, b, norm, apart = _compare(coarse, fine, chunk, weights)
        scale = share[chunk.bag]
        gap = (s - a).mul_(scale)
        # with cos = 1 − apart: ∂cos/∂a = (s − cos·a)/|a| = (gap + apart·a)/|a|, no cancellation
        d_a = torch.addcmul(gap, a, scale * apart).mul_(a).neg_()
        d_s = torch.addcmul(gap.neg_(), s, scale * apart).div_(norm).neg_()
        d_b = (weights @ d_s).mul_(b)
        for level, d in enumerate((d_a, d_b)):
            if once:
                d_logits[level][rows] = d.T
            elif isinstance(rows, slice):
                d_logits[level][rows] += d.T
            else:
                d_logits[level].index_add_(0, rows, d.T)
            chunk.add_to(d_lse[level], d)
    d_coarse, d_fine = (d.neg_().to(grad.dtype) for d in d_lse)
    return d_logits[0], d_coarse, d_logits[1], d_fine


class _Chunk(NamedTuple):
    """Instances that are worked on together: pieces of bags, one after another.

    Attributes:
        rows: The rows, a slice if they lie together.
        bag: The bag of each; its number alone if all are of one.
        lengths: int64 [pieces], or nothing for one.
        bags: int64 [pieces], the bag of each piece.
    """

    rows: slice | Tensor
    bag: int | Tensor
    lengths: Tensor | None = None
    bags: Tensor | None = None

    def add_to(self, total: Tensor, values: Tensor) -> None:
        """Add the sums of values [C, n] over the pieces to their bags in total, float64 [B, C]."""
        if self.lengths is None or self.bags is None:
            total[self.bag] += values.sum(1, dtype=torch.float64)
            return
        lengths = self.lengths.expand(len(values), -1).contiguous()
        values = values.double()  # a million terms stay exact
        sums = torch.segment_reduce(values, "sum", lengths=lengths, axis=1, unsafe=True)
        total.index_add_(0, self.bags, sums.T)


class _Compared(NamedTuple):
    """Instances of a chunk.

    Attributes:
        coarse: [Cc, n], unit vectors along the coarse attention.
        summed: [Cc, n], unit vectors along the children's.
        fine: [Cf, n], the fine attention, each instance's scaled by its largest entry.
        norm: [n], of the children's sums of `fine`.
        apart: [n], 1 − cosine.
    """

    coarse: Tensor
    summed: Tensor
    fine: Tensor
    norm: Tensor
    apart: Tensor


def _compare(coarse: Level, fine: Level, chunk: _Chunk, weights: Tensor) -> _Compared:
    a, b = (_scaled(logits[chunk.rows], lse, chunk.bag) for logits, lse in (coarse, fine))
    a /= _norms(a)
    s = weights.T @ b
    norm = _norms(s)
    s /= norm
    # |s − a|² / 2 = 1 − s·a for unit vectors, without the cancellation near agreement
    return _Compared(a, s, b, norm, (s - a).square_().sum(0).div_(2))


def _norms(columns: Tensor) -> Tensor:
    # vector_norm over the first dimension is a hundred times slower; entries are in [0, Cf]
    return columns.square().sum(0).sqrt_()


def _scaled(logits: Tensor, lse: Tensor, bag: Tensor | int) -> Tensor:
    """[C, n], attention of each instance over its largest entry: the cosine does not see scale."""
    log_attention = logits.new_empty(logits.shape[::-1])
    of_row = lse[bag, :, None] if isinstance(bag, int) else lse.T.contiguous().index_select(1, bag)
    torch.sub(logits.T, of_row, out=log_attention)
    return log_attention.sub_(log_attention.amax(0)).exp_()


def _weights(parent: Tensor, coarse: Tensor, average: bool) -> Tensor:
    """[Cf, Cc], how much of a fine class goes into a coarse one."""
    classes = torch.arange(coarse.shape[1], device=parent.device)
    children = (parent[:, None] == classes).to(coarse.dtype)
    return children / children.sum(0).clamp_min(1) if average else children


def _sizes(spans: Spans, like: Tensor) -> Tensor:
    sizes = torch.tensor([max(length, 1) for _, length in spans], dtype=like.dtype)
    return sizes.to(like.device, non_blocking=True)


def _chunks(spans: Spans, device: torch.device) -> Iterator[_Chunk]:
    """Up to _CHUNK instances each.

    On an accelerator bags stay together: there a loop over them costs more than their numbers.
    """
    alone = _ALONE if device.type == "cpu" else _CHUNK
    numbers: list[int] = []
    pieces: Spans = []
    filled = 0
    for k, (start, length) in enumerate(spans):
        for lo in range(start, start + length, _CHUNK):
            size = min(_CHUNK, start + length - lo)
            if size >= alone:
                yield _Chunk(slice(lo, lo + size), k)
                continue
            if filled + size > _CHUNK:
                yield _located(numbers, pieces, device)
                numbers, pieces, filled = [], [], 0
            numbers.append(k)
            pieces.append((lo, size))
            filled += size
    if pieces:
        yield _located(numbers, pieces, device)


def _located(numbers: list[int], pieces: Spans, device: torch.device) -> _Chunk:
    lengths, bags = torch.tensor([n for _, n in pieces]), torch.tensor(numbers)
    bag = bags.repeat_interleave(lengths)
    ends = [start + length for start, length in pieces]
    rows: slice | Tensor = slice(pieces[0][0], ends[-1])
    if ends[:-1] != [start for start, _ in pieces[1:]]:
        rows, _ = bag_rows(pieces, device)
    there = [t.to(device, non_blocking=True) for t in (bag, lengths, bags)]
    return _Chunk(rows, *there)
