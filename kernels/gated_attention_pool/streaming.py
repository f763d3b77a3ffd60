"""Gated attention pooling tile by tile, without [N, H] temporaries.

Short bags that follow one another share a tile: one product serves them all, and only softmax and
pooling, on bags padded to one length, tell them apart. Every operation on a CPU is a parallel
region, which on a busy machine may wait milliseconds for its threads, so their number counts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hmil_fast.kernels.bags import Spans

_TILE = 4096  # rows; large enough to keep every thread busy, small beside a bag
_KEEP_BYTES = 1 << 30  # gates above this are computed again in the backward pass


def pool_streaming(x: Tensor, weights: list[Tensor], spans: Spans) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_attention_pool` for weights [V, bv, U, bu, Wc, bc] in the dtype of the sums."""
    V, bv, U, bu, Wc, bc = weights
    W, b = torch.stack([V, U]), torch.stack([bv, bu])
    rows = sum(length for _, length in spans)
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    keep = training and rows * b.numel() * b.element_size() <= _KEEP_BYTES
    pooled, lse, logits = _Pool.apply(x, W, b, Wc, bc, spans, keep)
    return pooled, lse, logits


def pool_streaming_backward(
    x: Tensor,
    weights: list[Tensor],
    results: list[Tensor],
    grads: list[Tensor],
    spans: Spans,
    need_x: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, if wanted, and of W [2, H, D], b [2, H], Wc and bc.

    Args:
        x: [N, D].
        weights: W, b, Wc, bc, in the dtype of the sums.
        results: Pooled, lse and logits.
        grads: Theirs.
        spans: The bags.
        need_x: Whether x wants a gradient.
    """
    saved = (x, *weights[:3], *results, None)
    return _gradients(saved, _groups(spans, x.device), (need_x, *[True] * 4), grads)


class _Group(NamedTuple):
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

    def tiles(self) -> list[slice]:
        start, stop = self.rows.start, self.rows.stop
        return [slice(lo, min(lo + _TILE, stop)) for lo in range(start, stop, _TILE)]

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


def _groups(spans: Spans, device: torch.device) -> list[_Group]:
    """Group the bags; those of a tile or more stay alone."""
    found: list[tuple[int, int, list[int]]] = []  # first bag, first row, lengths
    end = -1  # row after the last group, if the next bag may join it
    for k, (start, length) in enumerate(spans):
        if not length:
            end = -1  # a group's numbers have no gaps
            continue
        lengths = [*found[-1][2], length] if start == end else []
        # padding is cheap beside the gates: allow as much of it as there are rows
        if lengths and sum(lengths) <= _TILE and len(lengths) * max(lengths) <= 2 * _TILE:
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
            _Group(
                slice(first, first + count), slice(start, start + rows), places, (count, longest)
            )
        )
    return groups


class _Pool(torch.autograd.Function):
    """W [2, H, D] and b [2, H] hold V and U; everything but x has the dtype of the sums."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor,
        Wc: Tensor,
        bc: Tensor,
        spans: Spans,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        classes, hidden = Wc.shape
        logits = W.new_zeros(x.shape[0], classes)
        pooled = W.new_zeros(len(spans), classes, x.shape[1])
        lse = W.new_full((len(spans), classes), -torch.inf)
        gates = W.new_empty(2, sum(length for _, length in spans) if keep else _TILE, hidden)
        product = W.new_empty(_TILE, hidden)
        done = 0
        groups = _groups(spans, x.device)
        for group in groups:
            for tile in group.tiles():
                n = tile.stop - tile.start
                t, s = _gates(x[tile].to(W.dtype), W, b, gates[:, done : done + n])
                done += n if keep else 0
                g = torch.mul(t, s, out=product[:n])
                torch.addmm(bc, g, Wc.T, out=logits[tile])
            scores = group.pad(logits[group.rows], -torch.inf)
            lse[group.bags] = torch.logsumexp(scores, dim=1)
            for tile in group.tiles():
                p = _attention(group, logits[tile], lse)
                pooled[group.bags].baddbmm_(p.mT, group.pad(x[tile].to(W.dtype)))
        ctx.groups = groups
        ctx.save_for_backward(x, W, b, Wc, pooled, lse, logits, gates if keep else None)
        return pooled, lse, logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_pooled: Tensor, d_lse: Tensor, d_logits: Tensor
    ) -> tuple[Tensor | None, ...]:
        # backward() may be called under autocast
        with torch.autocast(d_pooled.device.type, enabled=False):
            gradients = _gradients(
                ctx.saved_tensors, ctx.groups, ctx.needs_input_grad[:5], [d_pooled, d_lse, d_logits]
            )
        return (*gradients, None, None)


def _gradients(
    saved: tuple[Any, ...], groups: list[_Group], needs: tuple[bool, ...], grads: list[Tensor]
) -> tuple[Tensor | None, ...]:
    x, W, b, Wc, pooled, lse, logits, kept = saved
    need_x, need_w, need_b, need_wc, need_bc = needs
    d_pooled, d_lse, d_logits = grads
    hidden = Wc.shape[1]
    dx = W.new_zeros(x.shape) if need_x else None
    dW, db, dWc = torch.zeros_like(W), torch.zeros_like(b), torch.zeros_like(Wc)
    dbc = W.new_zeros(len(Wc))
    gates, d_gates = W.new_empty(2, 2, _TILE, hidden)
    g_buffer, dg_buffer = W.new_empty(2, _TILE, hidden)
    shift = d_lse - (d_pooled * pooled).sum(2)
    d_logits = d_logits.clone()
    done = 0
    for group in groups:
        for tile in group.tiles():
            n = tile.stop - tile.start
            h = x[tile].to(W.dtype)
            p = _attention(group, logits[tile], lse)
            d_p = torch.bmm(group.pad(h), d_pooled[group.bags].mT)
            d_p.add_(shift[group.bags, None]).mul_(p)
            ds = group.unpad(d_p) + d_logits[tile]
            d_logits[tile] = 0  # once for a row that lies in two bags
            t, s = _gates(h, W, b, gates[:, :n]) if kept is None else kept[:, done : done + n]
            done += n
            g = torch.mul(t, s, out=g_buffer[:n])
            dg = torch.mm(ds, Wc, out=dg_buffer[:n])
            # (1 − t²) s = s − g t and t s (1 − s) = g − g s
            dt, du = d_gates[:, :n]
            torch.addcmul(s, g, t, value=-1, out=dt).mul_(dg)
            torch.addcmul(g, g, s, value=-1, out=du).mul_(dg)
            if dx is not None:
                dx[tile] += group.unpad(torch.bmm(p, d_pooled[group.bags]))
                dx[tile].addmm_(dt, W[0]).addmm_(du, W[1])
            if need_w:
                dW[0].addmm_(dt.T, h)
                dW[1].addmm_(du.T, h)
            if need_b:
                db += d_gates[:, :n].sum(1)
            if need_wc:
                dWc.addmm_(ds.T, g)
            if need_bc:
                dbc += ds.sum(0)
    return (
        None if dx is None else dx.to(x.dtype),
        dW if need_w else None,
        db if need_b else None,
        dWc if need_wc else None,
        dbc if need_bc else None,
    )


def _attention(group: _Group, logits: Tensor, lse: Tensor) -> Tensor:
    """[bags, longest, C]; 0 on padding."""
    return torch.exp(group.pad(logits, -torch.inf) - lse[group.bags, None])


def _gates(h: Tensor, W: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write tanh(V h + bv) and σ(U h + bu) into out [2, n, H]."""
    # of rows that are no view: else the math library is called, with its threads, once a row
    torch.addmm(b[0], h, W[0].T, out=out[0]).tanh_()
    torch.addmm(b[1], h, W[1].T, out=out[1]).sigmoid_()
    return out
