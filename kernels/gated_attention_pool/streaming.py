"""Gated attention pooling tile by tile, without [N, H] temporaries."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hmil_fast.kernels.bags import Spans

_TILE = 2048  # rows; large enough to keep every thread busy, small beside a bag
_KEEP_BYTES = 1 << 30  # gates above this are computed again in the backward pass


def pool_streaming(x: Tensor, weights: list[Tensor], spans: Spans) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_attention_pool` for weights [V, bv, U, bu, Wc, bc] in the dtype of the sums."""
    V, bv, U, bu, Wc, bc = weights
    W, b = torch.cat([V, U]), torch.cat([bv, bu])
    rows = sum(length for _, length in spans)
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    keep = training and rows * W.shape[0] * W.element_size() <= _KEEP_BYTES
    pooled, lse, logits = _Pool.apply(x, W, b, Wc, bc, spans, keep)
    return pooled, lse, logits


class _Pool(torch.autograd.Function):
    """W [2H, D] holds V over U; everything but x has the dtype of the sums."""

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
        rows = sum(length for _, length in spans) if keep else _TILE
        gates = W.new_empty(rows, 2 * hidden)
        product = W.new_empty(_TILE, hidden)
        done = 0
        for k, (start, length) in enumerate(spans):
            if not length:
                continue
            for lo, hi in _tiles(start, length):
                n = hi - lo
                tile = gates[done : done + n] if keep else gates[:n]
                done += n
                _gates(x[lo:hi].to(W.dtype), W, b, tile)
                g = torch.mul(tile[:, :hidden], tile[:, hidden:], out=product[:n])
                torch.addmm(bc, g, Wc.T, out=logits[lo:hi])
            lse[k] = torch.logsumexp(logits[start : start + length], dim=0)
            for lo, hi in _tiles(start, length):
                p = torch.exp(logits[lo:hi] - lse[k])
                pooled[k].addmm_(p.T, x[lo:hi].to(W.dtype))
        ctx.spans, ctx.keep = spans, keep
        ctx.save_for_backward(x, W, b, Wc, pooled, lse, logits, gates if keep else None)
        return pooled, lse, logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_pooled: Tensor, d_lse: Tensor, d_logits: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, W, b, Wc, pooled, lse, logits, kept = ctx.saved_tensors
        need_x, need_w, need_b, need_wc, need_bc = ctx.needs_input_grad[:5]
        hidden = Wc.shape[1]
        dx = W.new_zeros(x.shape) if need_x else None
        ds = torch.zeros_like(logits)
        for start, length in ctx.spans:
            ds[start : start + length] = d_logits[start : start + length]
        for k, (start, length) in enumerate(ctx.spans):
            shift = d_lse[k] - (d_pooled[k] * pooled[k]).sum(1)
            for lo, hi in _tiles(start, length):
                p = torch.exp(logits[lo:hi] - lse[k])
                with torch.autocast(
                    W.device.type, enabled=False
                ):  # backward() may be called in one
                    d_p = x[lo:hi].to(W.dtype) @ d_pooled[k].T
                ds[lo:hi] += p * (d_p + shift)
                if dx is not None:
                    dx[lo:hi].addmm_(p, d_pooled[k])
        dbc = ds.sum(0) if need_bc else None
        dW, db, dWc = torch.zeros_like(W), torch.zeros_like(b), torch.zeros_like(Wc)
        buffer = W.new_empty(_TILE, 2 * hidden)
        d_buffer, g_buffer = torch.empty_like(buffer), W.new_empty(_TILE, hidden)
        dg_buffer = torch.empty_like(g_buffer)
        done = 0
        # no bag boundaries from here on: fewer, larger products
        for start, length in _runs(ctx.spans):
            for lo, hi in _tiles(start, length):
                n = hi - lo
                h = x[lo:hi].to(W.dtype)
                tile = _gates(h, W, b, buffer[:n]) if kept is None else kept[done : done + n]
                done += n
                t, s = tile[:, :hidden], tile[:, hidden:]
                g = torch.mul(t, s, out=g_buffer[:n])
                dg = torch.mm(ds[lo:hi], Wc, out=dg_buffer[:n])
                if need_wc:
                    dWc.addmm_(ds[lo:hi].T, g)
                # (1 − t²) s = s − g t and t s (1 − s) = g − g s
                d_tile = d_buffer[:n]
                torch.addcmul(s, g, t, value=-1, out=d_tile[:, :hidden]).mul_(dg)
                torch.addcmul(g, g, s, value=-1, out=d_tile[:, hidden:]).mul_(dg)
                if need_w:
                    dW.addmm_(d_tile.T, h)
                if need_b:
                    db += d_tile.sum(0)
                if dx is not None:
                    dx[lo:hi].addmm_(d_tile, W)
                ds[lo:hi] = 0  # a row that lies in two bags is worked on once
        return (
            None if dx is None else dx.to(x.dtype),
            dW if need_w else None,
            db if need_b else None,
            dWc if need_wc else None,
            dbc,
            None,
            None,
        )


def _runs(spans: Spans) -> Spans:
    """Join bags that follow one another in order and in x."""
    runs: Spans = []
    for start, length in spans:
        if runs and sum(runs[-1]) == start:
            runs[-1] = runs[-1][0], runs[-1][1] + length
        elif length:
            runs.append((start, length))
    return runs


def _tiles(start: int, length: int) -> list[tuple[int, int]]:
    end = start + length
    return [(lo, min(lo + _TILE, end)) for lo in range(start, end, _TILE)]


def _gates(h: Tensor, W: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write tanh(V h + bv) beside σ(U h + bu) into out [n, 2H]."""
    torch.addmm(b, h, W.T, out=out)
    hidden = W.shape[0] // 2
    out[:, :hidden].tanh_()
    out[:, hidden:].sigmoid_()
    return out
