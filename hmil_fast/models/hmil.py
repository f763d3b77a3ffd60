"""Hierarchical MIL with class-wise gated attention on every level of the label tree."""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmil_fast.kernels.bags import as_bags, check_bags
from hmil_fast.kernels.gated_attention_pool import gated_attention_pool
from hmil_fast.kernels.gated_attention_pool.chunked import Chunks, Pooled, pool_in_parts
from hmil_fast.models.inputs import cast as to_dtype
from hmil_fast.models.inputs import check_sizes
from hmil_fast.models.output import HmilOutput

_GATE_WIDTHS = (256, 64)  # first level, deeper levels


class Level(nn.Module):
    """Parameters of one level: embedding, gated attention per class, classifier.

    Attributes:
        embed: h of this level from the level above (from r on the first); None with evidence, where
            h is r on every level.
        V: Gate inside the tanh.
        U: Gate inside the sigmoid.
        w: Attention scores of the classes from the gates.
        classify: Logit of a class from its pooled h; shared by the classes, or a row for each.
        average: Logits from the mean r of the bag; None without evidence.
        scale: Weight of the evidence; None without.
    """

    def __init__(self, above: int, dim: int, gate: int, classes: int, evidence: bool) -> None:
        super().__init__()
        self.embed = None if evidence else nn.Linear(above, dim)
        self.V = nn.Linear(dim, gate)
        self.U = nn.Linear(dim, gate)
        self.w = nn.Linear(gate, classes)
        self.classify = nn.Linear(dim, classes if evidence else 1)
        self.average = nn.Linear(dim, classes) if evidence else None
        self.scale = nn.Parameter(torch.ones(())) if evidence else None

    def logits(self, means: Tensor, lse: Tensor, bag: tuple[Tensor, Tensor] | None) -> Tensor:
        """Logits [B, K].

        Args:
            means: Pooled h [B, K, dim].
            lse: [B, K].
            bag: With evidence the mean r [B, hidden] of the bags, and log n [B, 1].
        """
        if bag is None or self.average is None or self.scale is None:
            return cast("Tensor", self.classify(means)).squeeze(2)
        average, log_n = bag
        own = (means * self.classify.weight).sum(2) + self.classify.bias
        evidence = torch.where(log_n > -torch.inf, lse - log_n, 0)
        logits: Tensor = own + self.average(average) + self.scale * evidence
        return logits


class HMIL(nn.Module):
    """HMIL (Jin et al., IEEE TMI 2025, arXiv 2411.07660), for a label tree of any depth.

    r = ReLU(W1 x + b1); h¹ = W2 r + b2; hˡ = Wl hˡ⁻¹ + bl. Scores of level l by gated attention on
    hˡ, one softmax over the bag per class, M_c = Σ a_c hˡ, and one Linear(·→1) shared by the
    classes of a level. For (3, 7) classes and 1024-d features this has the 1,348,172 parameters of
    the release; below its two levels every further one adds a 256→256 embedding and a gate of 64.

    Everything after r is linear up to the gates, so `forward` multiplies the small matrices first
    and pools r itself, all levels in one call; h¹ and hˡ never exist. The parameters stay those
    of the paper. `forward_unfolded` states the same formulas word for word.

    The published classifier sees a class through its attention-weighted mean alone: how much of
    the bag the class has found is lost, and one weight vector serves all classes. With the readout
    "evidence" a class has its own w_c, and logit_c = w_c·M_c + b_c + g (lse_c − log n) + u_c·r̄:
    log of the mean of exp(score), which attention has worked out anyway, and the mean r̄ of r,
    which is one more class whose scores are 0. g, one per level, begins at 1 and u at 0. Every
    level reads r itself: with embeddings in a chain rare classes fell behind once instances were
    left out of steps (docs/accuracy.md). Attention begins almost even (w at a tenth).

    Args:
        dim: Feature dimension D.
        num_classes: Nodes per level of the label tree, coarse first; one level is allowed.
        hidden: Width of r and of the embeddings below the first level.
        dropout: Probability of dropping an entry of tanh(V h) ⊙ σ(U h) while training.
        readout: "paper", or "evidence".
    """

    def __init__(
        self,
        dim: int,
        num_classes: tuple[int, ...],
        *,
        hidden: int = 256,
        dropout: float = 0.0,
        readout: str = "paper",
    ) -> None:
        super().__init__()
        check_sizes(dim, num_classes, hidden, dropout)
        if readout not in ("paper", "evidence"):
            raise ValueError(f"readout is {readout!r}; give paper or evidence")
        self.evidence = readout == "evidence"
        self.dim, self.num_classes, self.dropout = dim, tuple(num_classes), dropout
        self.reduce = nn.Linear(dim, hidden)
        widths = [hidden, hidden if self.evidence else dim] + [hidden] * (len(num_classes) - 1)
        self.levels = nn.ModuleList(
            Level(above, width, _GATE_WIDTHS[min(l, 1)], num_classes[l], self.evidence)
            for l, (above, width) in enumerate(pairwise(widths))
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                gain_1 = self.evidence and module is not self.reduce
                nn.init.kaiming_normal_(
                    module.weight, nonlinearity="linear" if gain_1 else "leaky_relu"
                )
                nn.init.zeros_(module.bias)
        for level in self._levels():
            if level.average is not None:
                nn.init.zeros_(level.average.weight)
                level.w.weight.data.mul_(0.1)

    def forward(self, x: Tensor, bags: Tensor, targets: Tensor | None = None) -> HmilOutput:
        """Predict packed bags.

        Args:
            x: [N, D] features of any float dtype. On a GPU the first layer runs on every row: pass
                the batch, not a cache.
            bags: int64 [B, 2], (start, length) of each bag in x; keep it on the CPU.
            targets: Not used; for models that are told the labels while training.

        Returns:
            The output for B bags, float32 (float64 for a float64 model) under autocast too. An
            empty bag has M = 0: its logits are the classifier's bias, its embeddings 0.

        Raises:
            ValueError: x is no [N, D] matrix, or a bag leaves it.
        """
        bags = as_bags(bags)
        with torch.autocast(self._check(x).device.type, enabled=False):
            (V, bv, U, bu, Wc, bc), maps = self._fold()
        dropout = self.dropout if self.training else 0.0
        reduce = (self.reduce.weight, self.reduce.bias)
        pooled, lse, scores = gated_attention_pool(
            x, V, bv, U, bu, Wc, bc, bags, reduce=reduce, dropout=dropout
        )
        return self._predict(pooled, lse, scores, bags[:, 1] > 0, maps)

    def forward_chunks(self, chunks: Chunks, *, sharded: bool = False) -> HmilOutput:
        """Predict one bag that need not fit in memory; exact, and so are the gradients.

        One chunk is in memory at a time, beside the logits of all; the backward pass reads every
        chunk once more. `hmil_fast.bags.stored.StoredBag` reads a slide from the store in this
        way, ``torch.split(x, 4096)`` cuts a bag in memory.

        Args:
            chunks: The bag's features in order, ``chunks[k]`` of [n_k, D], on any device.
            sharded: The chunks are this rank's part of one bag over all ranks, which all return
                the same: give `HmilLoss` ``gather=False``. A parameter's gradient is then the mean
                of those of the ranks, see `pool_in_parts`.

        Returns:
            The output for the bag [[0, N]], as of `forward`.

        Raises:
            ValueError: A chunk is no [n, D] matrix.
        """
        weight, bias = self.reduce.weight, self.reduce.bias
        dropout = self.dropout if self.training else 0.0
        with torch.autocast(weight.device.type, enabled=False):
            weights, maps = self._fold()

        def pool(x: Tensor, W1: Tensor, b1: Tensor, *weights: Tensor) -> Pooled:
            x = self._check(x).to(W1.device, non_blocking=True)
            V, bv, U, bu, Wc, bc = weights
            bag = torch.tensor([[0, len(x)]])
            return gated_attention_pool(
                x, V, bv, U, bu, Wc, bc, bag, reduce=(W1, b1), dropout=dropout
            )

        pooled, lse, scores = pool_in_parts(
            chunks if len(chunks) else [weight.new_empty(0, self.dim)],
            pool,
            [weight, bias, *weights],
            random=dropout > 0,
            sharded=sharded,
        )
        return self._predict(pooled, lse, scores, torch.tensor([len(scores) > 0]), maps)

    def forward_unfolded(self, x: Tensor, bags: Tensor) -> HmilOutput:
        """The formulas as published, one bag at a time: the yardstick of tests and benchmarks.

        Same arguments and result as `forward`, for bags that do not overlap.
        """
        spans = check_bags(bags, self._check(x).shape[0])
        dropout = self.dropout if self.training else 0.0
        dtype = self.reduce.weight.dtype
        count = len(spans)
        means = [
            x.new_zeros(count, k, level.V.in_features, dtype=dtype)
            for k, level in zip(self.num_classes, self._levels(), strict=True)
        ]
        scores = [x.new_zeros(x.shape[0], k, dtype=dtype) for k in self.num_classes]
        lse = [x.new_full((count, k), -torch.inf, dtype=dtype) for k in self.num_classes]
        average = x.new_zeros(count, self.reduce.out_features, dtype=dtype)
        log_n = torch.tensor([[length] for _, length in spans], dtype=dtype).log().to(x.device)
        for b, (start, length) in enumerate(spans):
            if not length:
                continue
            h = F.relu(self.reduce(to_dtype(x[start : start + length], self.reduce.weight)))
            average[b] = h.mean(0)
            for l, level in enumerate(self._levels()):
                h = h if level.embed is None else level.embed(h)
                gated = torch.tanh(level.V(h)) * torch.sigmoid(level.U(h))
                s = level.w(F.dropout(gated, dropout))
                scores[l][start : start + length] = s
                lse[l][b] = torch.logsumexp(s, 0)
                means[l][b] = torch.softmax(s, 0).T @ h
        bag = (average, log_n) if self.evidence else None
        return self._output(means, tuple(scores), tuple(lse), bag)

    def _levels(self) -> list[Level]:
        return cast("list[Level]", list(self.levels))

    def _check(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x has shape {list(x.shape)}; give [N, {self.dim}]")
        return x

    def _fold(self) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Gates of all levels as one gate on r, and per level the map from r to hˡ.

        With evidence there are no maps, and one class more, last, whose scores are 0: its pooled r
        is the mean.
        """
        maps: list[tuple[Tensor, Tensor]] = []
        gates: list[list[Tensor]] = []
        for level in self._levels():
            V, U = level.V, level.U
            if level.embed is None:
                gates.append([V.weight, V.bias, U.weight, U.bias])
                continue
            A: Tensor = level.embed.weight
            c: Tensor = level.embed.bias
            if maps:
                above, shift = maps[-1]
                A, c = A @ above, A @ shift + c
            maps.append((A, c))
            gates.append([V.weight @ A, V.weight @ c + V.bias, U.weight @ A, U.weight @ c + U.bias])
        folded = [torch.cat(parts) for parts in zip(*gates, strict=True)]
        w = torch.block_diag(*(level.w.weight for level in self._levels()))  # type: ignore[no-untyped-call]
        b = torch.cat([level.w.bias for level in self._levels()])
        if self.evidence:
            w, b = F.pad(w, (0, 0, 0, 1)), F.pad(b, (0, 1))
        return [*folded, w, b], maps

    def _predict(
        self,
        pooled: Tensor,
        lse: Tensor,
        scores: Tensor,
        filled: Tensor,
        maps: list[tuple[Tensor, Tensor]],
    ) -> HmilOutput:
        """From r pooled for all levels; `filled` [B] says whether a bag has instances."""
        filled = filled.to(pooled.device, non_blocking=True)[:, None, None]
        sizes = [*self.num_classes, 1] if self.evidence else list(self.num_classes)
        (pooled_of, scores_of, lse_of) = (torch.split(t, sizes, 1) for t in (pooled, scores, lse))
        levels = len(self.num_classes)
        bag = (pooled_of[-1].squeeze(1), lse_of[-1]) if self.evidence else None
        with torch.autocast(pooled.device.type, enabled=False):
            means = list(pooled_of[:levels])
            if maps:
                means = [
                    torch.where(filled, F.linear(p, A, c), 0)  # Σ a = 1, so M = A (Σ a r) + c
                    for p, (A, c) in zip(means, maps, strict=True)
                ]
            return self._output(means, scores_of[:levels], lse_of[:levels], bag)

    def _output(
        self,
        means: list[Tensor],
        scores: tuple[Tensor, ...],
        lse: tuple[Tensor, ...],
        bag: tuple[Tensor, Tensor] | None = None,
    ) -> HmilOutput:
        logits = tuple(
            level.logits(mean, z, bag)
            for level, mean, z in zip(self._levels(), means, lse, strict=True)
        )
        norm = torch.linalg.vector_norm(means[-1], dim=2, keepdim=True)
        # a row of zeros (an empty bag, features of zeros) must not get the gradient 1/eps
        inverse = torch.where(norm > 1e-12, 1 / norm.clamp_min(1e-12), 0)
        return HmilOutput(logits, scores, lse, means[-1] * inverse)
