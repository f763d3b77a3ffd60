"""Export form of trained models: plain torch operations on one bag, for `torch.export` and ONNX.

It has no custom op and no packed bags, and its control flow does not depend on values.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmil_fast.models.abmil import ABMIL, GatedAttention
from hmil_fast.models.baselines import MaxPool, MeanPool
from hmil_fast.models.clam import CLAM
from hmil_fast.models.dsmil import DSMIL
from hmil_fast.models.feature_scale import NAME
from hmil_fast.models.flat import FlatHMIL
from hmil_fast.models.hmil import HMIL, Level

Parents = Sequence[Sequence[int]]
_Outputs = tuple[list[Tensor], list[Tensor]]  # logits [K_l] and attentions [n, K_l] per level


class PlainHead(nn.Module):
    """A trained model for one bag [n, D] with n ≥ 1, in evaluation mode.

    Args:
        model: Any of `hmil_fast.models`, on the CPU.
        parents: Per level below the first, the parent of each node.
        shares: Per level the shares of its nodes under the balanced prior, and those that the level
            learnt from, [K_l] each.
        summed: Whether the leaves alone decide; else the leaf is reached from the root by the
            heads of all levels.
    """

    def __init__(
        self,
        model: nn.Module,
        parents: Parents,
        shares: Sequence[tuple[Tensor, Tensor]],
        *,
        summed: bool,
    ) -> None:
        super().__init__()
        self.body, self.scale = _body(model, parents), getattr(model, NAME, None)
        self.has_attention = not isinstance(model, MeanPool | MaxPool)
        self.num_levels = len(parents) + 1
        self.summed = summed
        for l, below in enumerate(_below(parents)):
            self.register_buffer(f"below{l}", below)
        for l, (prior, trained) in enumerate(shares):
            self.register_buffer(f"log_prior{l}", prior.log())
            self.register_buffer(f"log_trained{l}", trained.log())
            above = parents[l - 1] if l else [0] * len(prior)
            self.register_buffer(f"parent{l}", torch.tensor(above))
        self.eval().requires_grad_(False)

    @property
    def output_names(self) -> list[str]:
        """Names of what `forward` returns, in its order."""
        kinds = ["logits", "probabilities", *(["attention"] if self.has_attention else [])]
        return [f"{kind}_{l}" for kind in kinds for l in range(self.num_levels)]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits [K_l], probabilities [K_l] and attentions [n, K_l], each for every level."""
        logits, attentions = self.body(x if self.scale is None else self.scale(x))
        p = self._leaf_probabilities(logits)
        above = [p @ self.get_buffer(f"below{l}") for l in range(len(logits) - 1)]
        probabilities = [*above, p]
        return (*logits, *probabilities, *attentions)

    def _leaf_probabilities(self, logits: list[Tensor]) -> Tensor:
        """`hmil_fast.metrics.leaf_probabilities` in logarithms, [leaves]."""
        evidence = [torch.log_softmax(z, 0) - self.get_buffer(f"log_trained{l}")
                    for l, z in enumerate(logits)]  # fmt: skip
        log_p = torch.zeros(1)
        for l in range(self.num_levels):
            own = evidence[l]
            if self.summed and l < self.num_levels - 1:
                below = self.get_buffer(f"below{l}").T > 0
                own = torch.where(below, evidence[-1], -torch.inf).amax(1)
            own = own + self.get_buffer(f"log_prior{l}")
            parent = self.get_buffer(f"parent{l}")
            family = torch.where(parent == parent[:, None], own, -torch.inf)
            log_p = log_p[parent] + own - torch.logsumexp(family, 1)
        return log_p.exp()


def _body(model: nn.Module, parents: Parents) -> nn.Module:
    if isinstance(model, HMIL):
        return _Hmil(model)
    if isinstance(model, FlatHMIL):
        return _Flat(model, parents)
    if isinstance(model, ABMIL | CLAM):
        return _Attended(model)
    if isinstance(model, DSMIL):
        return _Dsmil(model)
    if isinstance(model, MeanPool | MaxPool):
        return _Pooled(model)
    raise ValueError(
        f"a {type(model).__name__} has no export form; add one to hmil_fast/models/export_form.py"
    )


def _below(parents: Parents) -> list[Tensor]:
    """Per level, which leaves lie below each of its nodes: float [leaves, K_l] of 0 and 1."""
    if not parents:
        return []
    levels = [torch.eye(len(parents[-1]))]
    for l in reversed(range(len(parents))):
        count = len(parents[l - 1]) if l else max(parents[0]) + 1
        levels.append(levels[-1] @ F.one_hot(torch.tensor(parents[l]), count).float())
    return levels[::-1]


class _Hmil(nn.Module):
    """The folded form: everything is pooled as r = ReLU(W1 x + b1)."""

    def __init__(self, model: HMIL) -> None:
        super().__init__()
        self.reduce, self.sizes = model.reduce, list(model.num_classes)
        self.levels, self.evidence = model.levels, model.evidence
        with torch.no_grad():
            weights, maps = model._fold()
        for name, weight in zip(("V", "bv", "U", "bu", "w", "b"), weights, strict=True):
            self.register_buffer(name, weight.detach().clone())
        for l, (A, c) in enumerate(maps):
            self.register_buffer(f"A{l}", A.detach().clone())
            self.register_buffer(f"c{l}", c.detach().clone())

    def forward(self, x: Tensor) -> _Outputs:
        V, bv, U, bu, w, b = (self.get_buffer(name) for name in ("V", "bv", "U", "bu", "w", "b"))
        r = torch.relu(self.reduce(x))
        gate = torch.tanh(F.linear(r, V, bv)) * torch.sigmoid(F.linear(r, U, bu))
        scores = F.linear(gate, w, b)[:, : sum(self.sizes)]
        attention = torch.softmax(scores, 0)
        log_n = torch.ones_like(scores[:, :1]).sum(0, keepdim=True).log()
        bag = (r.mean(0, keepdim=True), log_n) if self.evidence else None
        lse = torch.split(torch.logsumexp(scores, 0), self.sizes)
        logits = []
        for l, pooled in enumerate(torch.split(attention.T @ r, self.sizes)):
            mean = pooled
            if not self.evidence:
                mean = F.linear(pooled, self.get_buffer(f"A{l}"), self.get_buffer(f"c{l}"))
            level = cast("Level", self.levels[l])
            logits.append(level.logits(mean[None], lse[l][None], bag).squeeze(0))
        return logits, list(torch.split(attention, self.sizes, 1))


class _Flat(nn.Module):
    """The leaves alone; log of the sums, and means of the attentions, above."""

    def __init__(self, model: FlatHMIL, parents: Parents) -> None:
        super().__init__()
        self.leaves = _Hmil(model.leaves)
        self.levels = len(parents)
        for l, below in enumerate(_below(parents)):
            self.register_buffer(f"below{l}", below)

    def forward(self, x: Tensor) -> _Outputs:
        (leaf,), (attention,) = self.leaves(x)
        log_p = torch.log_softmax(leaf, 0)
        logits, attentions = [], []
        for l in range(self.levels):
            below = self.get_buffer(f"below{l}")  # [leaves, K_l]
            outside = torch.where(below > 0, 0.0, -torch.inf)
            logits.append(torch.logsumexp(log_p[:, None] + outside, 0))
            attentions.append(attention @ (below / below.sum(0)))
        return [*logits, log_p], [*attentions, attention]


class _Attended(nn.Module):
    """ABMIL and CLAM: one attention for all nodes, or one for each."""

    def __init__(self, model: ABMIL | CLAM) -> None:
        super().__init__()
        self.attention = model.attention
        self.sizes = list(model.num_classes)
        self.heads = model.heads if isinstance(model, ABMIL) else None
        self.classify = model.classify if isinstance(model, CLAM) else None

    def forward(self, x: Tensor) -> _Outputs:
        h = torch.relu(self.attention.embed(x))
        attention = _gated(self.attention, h)
        pooled = attention.T @ h  # [C, hidden]
        if self.heads is not None:
            logits = [head(pooled).squeeze(0) for head in self.heads]
            return logits, [attention.expand(-1, k) for k in self.sizes]
        assert self.classify is not None
        scores = (pooled * self.classify.weight).sum(1) + self.classify.bias
        return list(torch.split(scores, self.sizes)), list(torch.split(attention, self.sizes, 1))


def _gated(attention: GatedAttention, h: Tensor) -> Tensor:
    gate = torch.tanh(attention.V(h)) * torch.sigmoid(attention.U(h))
    return torch.softmax(attention.w(gate), 0)


class _Dsmil(nn.Module):
    """Both streams, with queries and values of every instance as published."""

    def __init__(self, model: DSMIL) -> None:
        super().__init__()
        self.embed, self.score, self.heads = model.embed, model.score, model.heads
        self.query, self.value, self.sizes = model.query, model.value, list(model.num_classes)

    def forward(self, x: Tensor) -> _Outputs:
        h = torch.relu(self.embed(x))
        scores = self.score(h)
        queries = self.query(h)  # [n, 128]
        critical = queries[scores.argmax(0)]  # [C, 128]
        attention = torch.softmax(queries @ critical.T / queries.shape[1] ** 0.5, 0)
        pooled = attention.T @ self.value(h)
        bounds = list(pairwise([0, *torch.tensor(self.sizes).cumsum(0).tolist()]))
        logits = [
            (scores.amax(0)[a:b] + head(pooled[a:b].flatten())) / 2
            for head, (a, b) in zip(self.heads, bounds, strict=True)
        ]
        return logits, list(torch.split(attention, self.sizes, 1))


class _Pooled(nn.Module):
    """Mean and max, which have no attention."""

    def __init__(self, model: MeanPool | MaxPool) -> None:
        super().__init__()
        self.first, self.heads = model.first, model.heads
        self.largest = isinstance(model, MaxPool)

    def forward(self, x: Tensor) -> _Outputs:
        pooled = self.first(x).amax(0) if self.largest else self.first(x.mean(0))
        return [head(torch.relu(pooled)) for head in self.heads], []
