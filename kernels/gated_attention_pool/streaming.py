"""Gated attention pooling tile by tile: no temporary grows with the rows of a bag.

A tile's rows are read, reduced, gated and pooled while they are in the processor's cache; running
sums carry a bag from tile to tile. Short bags that follow one another share a tile: one product
serves them all, and only softmax and pooling, on bags padded to one length, tell them apart. Every
operation on a CPU is a parallel region, which on a busy machine may wait milliseconds for its
threads, so their number counts.

Products are in the dtype of the rows, bfloat16 among them where the processor multiplies it (four
times as fast as float32 by AVX-512); sums, gates, logits and softmax in that of the weights.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hmil_fast.device import computes_in_bf16
from hmil_fast.kernels.bags import Spans
from hmil_fast.kernels.gated_attention_pool.groups import Group, grouped

_TILE = 4096  # rows; large enough to keep every thread busy, small beside a bag
# on a GPU, where a launch costs as much as a thousand rows, and gates of so many take 0.3 GB
_TILE_GPU = 1 << 16
_KEEP_BYTES = 1 << 30  # gates above this are computed again in the backward pass


def pool_streaming(
    x: Tensor,
    weights: list[Tensor],
    spans: Spans,
    reduce: tuple[Tensor, Tensor] | None = None,
    products: torch.dtype | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_attention_pool` for weights [V, bv, U, bu, Wc, bc] in the dtype of the sums.

    Args:
        x: [N, D'].
        weights: They take rows of D.
        spans: The bags.
        reduce: W1 [D, D'] and b1 [D], in the dtype of the sums; without, D' is D.
        products: The dtype of products with rows; that of x by default.
        dropout: Of the gates. What is dropped is drawn again in the backward pass, not kept.
    """
    V, bv, U, bu, Wc, bc = weights
    W, b = torch.stack([V, U]), torch.stack([bv, bu])
    rows = sum(length for _, length in spans)
    W1, b1 = reduce or (None, None)
    inputs = (x, W1, b1, W, b, Wc, bc)
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    wide = b.numel() + (0 if b1 is None else b1.numel())
    keep = training and rows * wide * b.element_size() <= _KEEP_BYTES
    seed = int(torch.randint(2**62, ())) if dropout else 0
    pooled, lse, logits = _Pool.apply(*inputs, spans, keep, products or x.dtype, (dropout, seed))
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
    operands = _Operands(x, None, None, *weights)
    needs = _Operands(need_x, False, False, *[True] * 4)
    groups = grouped(spans, _tile(x.device), x.device)
    layers = _Layers(operands, x.dtype)
    saved = _Saved(results, needs)
    found = _gradients(operands, saved, layers, groups, grads)
    return (found[0], *found[3:])


def _tile(device: torch.device) -> int:
    """Rows that are worked on together."""
    return _TILE if device.type == "cpu" else _TILE_GPU


class _Operands(NamedTuple):
    """Tensors, their gradients, or whether these are wanted.

    W [2, H, D] and b [2, H] hold V and U; all but x have the dtype of the sums.
    """

    x: Any
    W1: Any
    b1: Any
    W: Any
    b: Any
    Wc: Any
    bc: Any


class _Saved(NamedTuple):
    """What the backward pass finds.

    Attributes:
        results: Pooled, lse, logits.
        needs: Which gradients are wanted.
        rows: The reduced rows of all bags, if they were kept.
        gates: The gates [2, rows, H], if they were kept.
    """

    results: list[Tensor]
    needs: _Operands
    rows: Tensor | None = None
    gates: Tensor | None = None


class _Dropout:
    """Masks for tiles, one after the other; the same ones for the same seed."""

    def __init__(self, dropped: tuple[float, int], device: torch.device) -> None:
        share, seed = dropped
        self.share = share
        self._generator = torch.Generator(device).manual_seed(seed) if share else None

    def mask(self, like: Tensor) -> Tensor | None:
        """What the entries of a tile are multiplied with; None if nothing is dropped."""
        if self._generator is None:
            return None
        keep = 1 - self.share
        return torch.empty_like(like).bernoulli_(keep, generator=self._generator).div_(keep)


class _Layers:
    """Reduction and gates of a tile, in the dtype of the products."""

    def __init__(self, o: _Operands, products: torch.dtype) -> None:
        self.sums = o.W.dtype
        # float16 is slow on a CPU, and bfloat16 without instructions for it
        quick = products == torch.bfloat16 and computes_in_bf16(o.x.device)
        self.products = products if quick else self.sums
        self.x: Tensor = o.x
        self.W: Tensor = o.W.to(self.products)
        self.W1: Tensor | None = None if o.W1 is None else o.W1.to(self.products)
        self.b1: Tensor | None = None if o.b1 is None else o.b1.to(self.products)
        # tanh(v) = 2 σ(2v) − 1, a tenth of the time of tanh; to double is exact
        self.inner, self.b = (torch.stack([2 * t[0], t[1]]) for t in (self.W, o.b))

    def read(self, tile: slice) -> Tensor:
        """The rows of x."""
        h = self.x[tile]
        if h.dtype == torch.float16:  # to bfloat16 by way of float32 is twice as quick
            h = h.float()
        return h.to(self.products)

    def rows(self, tile: slice) -> Tensor:
        """The rows that are pooled [n, D]."""
        h = self.read(tile)
        if self.W1 is None or self.b1 is None:
            return h
        return torch.addmm(self.b1, h, self.W1.T).relu_()

    def gates(self, h: Tensor, out: Tensor) -> Tensor:
        """Write tanh(V h + bv) and σ(U h + bu) into out [2, n, H]."""
        for k, gate in enumerate(out):
            # into rows that are no view: else the math library is called, with its threads, once
            # a row
            if self.products == self.sums:
                torch.addmm(self.b[k], h, self.inner[k].T, out=gate)
            else:
                gate.copy_(torch.mm(h, self.inner[k].T)).add_(self.b[k])
            gate.sigmoid_()
        out[0].mul_(2).sub_(1)
        return out

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """Total += a b."""
        if self.products == self.sums:
            total.addmm_(a, b)
        else:
            total += torch.mm(a.to(self.products), b.to(self.products))


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        o, (spans, keep, products, dropped) = _Operands(*inputs[:7]), inputs[7:]
        layers = _Layers(o, products)
        classes, hidden = o.Wc.shape
        dim = o.W.shape[2]
        logits = o.W.new_zeros(o.x.shape[0], classes)
        pooled = o.W.new_zeros(len(spans), classes, dim)
        lse = o.W.new_full((len(spans), classes), -torch.inf)
        most = _tile(o.x.device)
        kept_rows = sum(length for _, length in spans) if keep else most
        gates = o.W.new_empty(2, kept_rows, hidden)
        reduced = None
        if keep and o.W1 is not None:
            reduced = o.W.new_empty(kept_rows, dim, dtype=layers.products)
        product = o.W.new_empty(most, hidden)
        dropout = _Dropout(dropped, o.x.device)
        done = 0
        groups = grouped(spans, most, o.x.device)
        for group in groups:
            state = _State(group.size[0], classes, dim, o.W)
            for tile in group.tiles(most):
                n = tile.stop - tile.start
                h = layers.rows(tile)
                if reduced is not None:
                    reduced[done : done + n] = h
                t, s = layers.gates(h, gates[:, done : done + n])
                done += n if keep else 0
                g = torch.mul(t, s, out=product[:n])
                mask = dropout.mask(g)
                if mask is not None:
                    g.mul_(mask)
                scores = torch.addmm(o.bc, g, o.Wc.T, out=logits[tile])
                state.add(group.pad(scores, -torch.inf), group.pad(h.to(o.W.dtype)))
            pooled[group.bags], lse[group.bags] = state.result()
        ctx.groups, ctx.products, ctx.dropped = groups, products, dropped
        ctx.save_for_backward(*o, pooled, lse, logits, reduced, gates if keep else None)
        return pooled, lse, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        o = _Operands(*saved[:7])
        # backward() may be called under autocast
        with torch.autocast(grads[0].device.type, enabled=False):
            found = _gradients(
                o,
                _Saved(list(saved[7:10]), _Operands(*ctx.needs_input_grad[:7]), *saved[10:]),
                _Layers(o, ctx.products),
                ctx.groups,
                list(grads),
                ctx.dropped,
            )
        return (*found, None, None, None, None)


class _State:
    """Softmax and weighted sum of the bags of a group over the tiles seen so far."""

    def __init__(self, bags: int, classes: int, dim: int, like: Tensor) -> None:
        self.top = like.new_full((bags, classes), -torch.inf)
        self.total = like.new_zeros(bags, classes)
        self.sums = like.new_zeros(bags, classes, dim)

    def add(self, scores: Tensor, rows: Tensor) -> None:
        """Scores [bags, n, C], −inf on padding; rows [bags, n, D]."""
        top = torch.maximum(self.top, scores.amax(1))
        fade = torch.exp(self.top - top)
        weights = torch.exp(scores - top[:, None])
        self.total = self.total * fade + weights.sum(1)
        self.sums = torch.baddbmm(self.sums * fade[:, :, None], weights.mT, rows)
        self.top = top

    def result(self) -> tuple[Tensor, Tensor]:
        """Pooled [bags, C, D] and lse [bags, C]."""
        return self.sums / self.total[:, :, None], self.top + self.total.log()


def _gradients(
    o: _Operands,
    saved: _Saved,
    layers: _Layers,
    groups: list[Group],
    grads: list[Tensor],
    dropped: tuple[float, int] = (0.0, 0),
) -> _Operands:
    needs = saved.needs
    pooled, lse, logits = saved.results
    d_pooled, d_lse, d_logits = grads
    dropout = _Dropout(dropped, o.x.device)
    hidden = o.Wc.shape[1]
    need_rows = needs.x or needs.W1 or needs.b1
    dx = o.W.new_zeros(o.x.shape) if needs.x else None
    d = _Operands(dx, *(None if t is None else torch.zeros_like(t, dtype=o.W.dtype) for t in o[1:]))
    most = _tile(o.x.device)
    gates, d_gates = o.W.new_empty(2, 2, most, hidden)
    g_buffer, dg_buffer = o.W.new_empty(2, most, hidden)
    shift = d_lse - (d_pooled * pooled).sum(2)
    d_logits = d_logits.clone()
    done = 0
    for group in groups:
        for tile in group.tiles(most):
            n = tile.stop - tile.start
            mine = slice(done, done + n)
            done += n
            h = layers.rows(tile) if saved.rows is None else saved.rows[mine]
            scores = group.pad(logits[tile], -torch.inf)
            p = torch.exp(scores - lse[group.bags, None])  # [bags, longest, C], 0 on padding
            d_p = torch.bmm(group.pad(h.to(o.W.dtype)), d_pooled[group.bags].mT)
            d_p.add_(shift[group.bags, None]).mul_(p)
            ds = group.unpad(d_p) + d_logits[tile]
            d_logits[tile] = 0  # once for a row that lies in two bags
            t, s = layers.gates(h, gates[:, :n]) if saved.gates is None else saved.gates[:, mine]
            g = torch.mul(t, s, out=g_buffer[:n])
            dg = torch.mm(ds, o.Wc, out=dg_buffer[:n])
            mask = dropout.mask(g)
            if mask is not None:
                dg.mul_(mask)
            # (1 − t²) s = s − g t and t s (1 − s) = g − g s
            dt, du = d_gates[:, :n]
            torch.addcmul(s, g, t, value=-1, out=dt).mul_(dg)
            torch.addcmul(g, g, s, value=-1, out=du).mul_(dg)
            if needs.b:
                d.b.add_(d_gates[:, :n].sum(1))
            if needs.Wc:
                d.Wc.addmm_(ds.T, g if mask is None else g.mul_(mask))
            if needs.bc:
                d.bc.add_(ds.sum(0))
            dt, du = dt.to(layers.products), du.to(layers.products)
            if needs.W:
                layers.add_product(d.W[0], dt.T, h)
                layers.add_product(d.W[1], du.T, h)
            if not need_rows:
                continue
            dh = group.unpad(torch.bmm(p, d_pooled[group.bags]))
            layers.add_product(dh, dt, layers.W[0])
            layers.add_product(dh, du, layers.W[1])
            if layers.W1 is not None:
                dh = torch.ops.aten.threshold_backward(dh.to(layers.products), h, 0)
                if needs.b1:
                    d.b1.add_(dh.sum(0, dtype=layers.sums))
                if needs.W1:
                    layers.add_product(d.W1, dh.T, layers.read(tile))
                if dx is not None:
                    layers.add_product(dx[tile], dh, layers.W1)
            elif dx is not None:
                dx[tile] += dh
    return _Operands(
        *(
            None if gradient is None or not need else gradient.to(tensor.dtype)
            for gradient, need, tensor in zip(d, needs, o, strict=True)
        )
    )
