"""CLAM with an attention branch per class, on every level of the label tree."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmil_fast.models.abmil import GatedAttention
from hmil_fast.models.inputs import cast, check_sizes, features
from hmil_fast.models.output import HmilOutput
from hmil_fast.models.segments import Segments, segments

_SAMPLES = 8  # the paper's B: instances from either end of an attention
_WEIGHT = 0.3 / 0.7  # of the instances' loss, beside a bag loss of weight 1


class CLAM(nn.Module):
    """CLAM-MB (Lu et al., Nat. Biomed. Eng. 2021), its nodes of all levels being the branches.

    h_i = ReLU(W x_i + b), gated attention with one branch per node, one Linear(·→1) per node on the
    h pooled by that branch. While training every branch also sorts instances with a Linear(·→2) of
    its own: the most attended of the bag's true node are positive and its least attended negative;
    the most attended of every other node of the level are negative, nodes of a level excluding one
    another.

    Written from the paper's description, with two differences: the instances' loss is
    cross-entropy, not the smooth top-1 SVM loss, and bags of fewer than 16 instances give half of
    them to either end, so that no instance is called both.

    Args:
        dim: Feature dimension D.
        num_classes: Nodes per level of the label tree, coarse first.
        hidden: Width of h.
        dropout: As for `GatedAttention`.
    """

    def __init__(
        self, dim: int, num_classes: tuple[int, ...], *, hidden: int = 256, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_sizes(dim, num_classes, hidden, dropout)
        self.num_classes = tuple(num_classes)
        self.dim = dim
        self.attention = GatedAttention(dim, hidden, sum(num_classes), dropout)
        self.classify = nn.Linear(hidden, sum(num_classes))  # row c reads only what c has pooled
        self.sort = nn.Linear(hidden, 2 * sum(num_classes))

    def forward(self, x: Tensor, bags: Tensor, targets: Tensor | None = None) -> HmilOutput:
        """Predict packed bags; arguments as for `HMIL.forward`. An empty bag pools to 0.

        While training the output holds the instances' loss, if `targets` int64 [B, L] are given,
        and no attention, so that none is aligned along the tree.
        """
        rows = features(x, self.dim)
        pooled, lse, scores = self.attention(rows, bags)
        sizes = list(self.num_classes)
        with torch.autocast(x.device.type, enabled=False):
            logits = (pooled * self.classify.weight).sum(2) + self.classify.bias
            levels = torch.split(logits, sizes, 1)
            if self.training:
                loss = None
                if targets is not None:
                    parts = segments(bags, len(rows), rows.device)
                    loss = _WEIGHT * self._sort_instances(rows, scores, parts, targets)
                return HmilOutput(levels, (), (), None, loss)
        maps = torch.split(scores[: x.shape[0]], sizes, 1)
        return HmilOutput(levels, maps, torch.split(lse, sizes, 1), None)

    def _sort_instances(
        self, x: Tensor, scores: Tensor, parts: Segments, targets: Tensor
    ) -> Tensor:
        """Cross-entropy of the instances, mean over a branch's, the branches, levels and bags."""
        order = parts.order(scores)  # [N, C]
        samples = parts.length.div(2, rounding_mode="floor").clamp(max=_SAMPLES)  # [B]
        place = torch.arange(_SAMPLES, device=x.device)
        used = place < samples[:, None]  # [B, S]
        first = parts.length.cumsum(0) - parts.length
        last = first + parts.length - 1
        top = torch.where(used, first[:, None] + place, 0)
        bottom = torch.where(used, last[:, None] - place, 0)
        true = torch.cat(
            [F.one_hot(targets[:, l], k) for l, k in enumerate(self.num_classes)], dim=1
        )  # [B, C]
        per_level = [true.new_full((k,), len(self.num_classes) * k) for k in self.num_classes]
        weight = 1 / torch.cat(per_level).to(self.sort.weight.dtype)  # mean over a level's, levels

        best = self._sorted(x, order[top])  # [B, S, C, 2]
        worst = self._sorted(x, order[bottom])
        chosen = torch.where(true[:, None] == 1, best[..., 1], best[..., 0])
        # a true branch has twice the instances, so each counts half
        each = torch.where(true[:, None] == 1, (chosen + worst[..., 0]) / 2, chosen)
        each = torch.where(used[:, :, None], each, 0).sum(1) / samples.clamp_min(1)[:, None]
        # over all bags: ranks may hold unequal shares of those that have samples
        return -(each * weight).sum() / max(len(samples), 1)

    def _sorted(self, x: Tensor, rows: Tensor) -> Tensor:
        """Log-probabilities [B, S, C, 2] of (negative, positive) for row rows[b, s, c] by c."""
        embed = self.attention.embed
        h = torch.relu(embed(cast(x[rows], embed.weight)))  # [B, S, C, hidden]
        weight = self.sort.weight.view(-1, 2, self.sort.in_features)
        logits = torch.einsum("bsch,cjh->bscj", h, weight) + self.sort.bias.view(-1, 2)
        return F.log_softmax(logits, dim=3)
