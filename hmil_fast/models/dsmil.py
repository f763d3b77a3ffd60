"""DSMIL: max pooling of instance scores, and attention by similarity to the critical instance."""

import torch
from torch import Tensor, nn

from hmil_fast.models.inputs import cast, check_sizes, features
from hmil_fast.models.output import HmilOutput
from hmil_fast.models.segments import Segments, segments

_QUERY = 128


class DSMIL(nn.Module):
    """DSMIL (Li, Li, Eliceiri, CVPR 2021), with the nodes of all levels as its classes.

    h_i = ReLU(W x_i + b). First stream: a score per node and instance; the largest is the bag's,
    its instance m the critical one. Second: q = Q h, attention of instance i for a node by the
    softmax of ⟨q_i, q_m⟩/√128 over the bag, pooled values v = V h, and per level a Linear from the
    pooled values of all its nodes to their logits. The bag's logits are the mean of both streams.
    Written from the paper's description; the scale 1/√128 is added, so that the softmax does not
    start saturated.

    Linear maps move past sums: Σ a V h = V Σ a h and ⟨Q h_i, q_m⟩ = ⟨h_i, Qᵀ q_m⟩ (up to a constant
    of the bag), so no instance is mapped to q or v.

    Args:
        dim: Feature dimension D.
        num_classes: Nodes per level of the label tree, coarse first.
        hidden: Width of h and v.
    """

    def __init__(self, dim: int, num_classes: tuple[int, ...], *, hidden: int = 256) -> None:
        super().__init__()
        check_sizes(dim, num_classes, hidden)
        self.num_classes = tuple(num_classes)
        self.embed = nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, sum(num_classes))
        self.query = nn.Linear(hidden, _QUERY)
        self.value = nn.Linear(hidden, hidden)
        self.heads = nn.ModuleList(nn.Linear(k * hidden, k) for k in num_classes)

    def forward(self, x: Tensor, bags: Tensor, targets: Tensor | None = None) -> HmilOutput:
        """Predict packed bags; arguments as for `HMIL.forward`.

        An empty bag scores 0 in the first stream and pools to 0 in the second. While training the
        output holds no attention, so that none is aligned along the tree.
        """
        h = torch.relu(self.embed(cast(features(x, self.embed.in_features), self.embed.weight)))
        parts = segments(bags, len(h), h.device)
        sizes = list(self.num_classes)
        with torch.autocast(x.device.type, enabled=False):
            h = h.to(self.score.weight.dtype)
            scores = self.score(h)  # [N, C]
            critical = parts.argmax(scores)  # [B, C]
            largest = torch.where(parts.filled, scores.gather(0, critical), 0)
            queries = self.query(h[critical])
            keys = queries @ self.query.weight / _QUERY**0.5  # [B, C, hidden]
            pooled, lse, attention = _attend(h, keys, parts)
            values = torch.where(parts.filled[:, :, None], self.value(pooled), 0)
            logits = tuple(
                (first + head(level.flatten(1))) / 2
                for first, head, level in zip(
                    torch.split(largest, sizes, 1),
                    self.heads,
                    torch.split(values, sizes, 1),
                    strict=True,
                )
            )
        if self.training:
            return HmilOutput(logits, (), (), None)
        maps = torch.split(attention[: x.shape[0]], sizes, 1)
        return HmilOutput(logits, maps, torch.split(lse, sizes, 1), None)


def _attend(h: Tensor, keys: Tensor, parts: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled [B, C, hidden], lse [B, C] and scores [N, C] of the attention by keys [B, C, hidden].

    Matrix products on tiles of rows that each lie in one bag.
    """
    count, classes = keys.shape[:2]
    rows, inside, bag = parts.tiles()
    own = bag.clamp(max=max(count - 1, 0))
    tiles = torch.where(inside[:, :, None], h[rows], 0)  # [M, T, hidden]
    scores = tiles @ keys[own].mT  # [M, T, C]
    scores = torch.where(inside[:, :, None], scores, -torch.inf)

    most = scores.new_full((count + 1, classes), -torch.inf)
    index = bag[:, None].expand(-1, classes)
    most = most.scatter_reduce(0, index, scores.detach().amax(1), "amax")
    most = torch.where(torch.isneginf(most), 0, most)
    weights = (scores - most[bag][:, None]).exp()  # [M, T, C]
    sums = scores.new_zeros(count + 1, classes).index_add(0, bag, weights.sum(1))
    pooled = h.new_zeros(count + 1, classes, h.shape[1]).index_add(0, bag, weights.mT @ tiles)
    total = torch.where(parts.filled, sums[:-1], 1)
    lse = torch.where(parts.filled, most[:-1] + total.log(), -torch.inf)
    flat = scores.new_zeros(len(h) + 1, classes)
    place = torch.where(inside, rows, len(h)).flatten()
    by_row = flat.index_copy(0, place, torch.where(inside[:, :, None], scores, 0).flatten(0, 1))
    return pooled[:-1] / total[:, :, None], lse, by_row[:-1]
