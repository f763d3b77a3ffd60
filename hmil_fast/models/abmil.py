"""Attention-based MIL: one gated attention over the bag, whatever the class."""

import torch
from torch import Tensor, nn

from hmil_fast.kernels.gated_attention_pool import gated_attention_pool
from hmil_fast.models.inputs import check_sizes, features
from hmil_fast.models.output import HmilOutput


class GatedAttention(nn.Module):
    """h = ReLU(W x + b), scores w (tanh(V h) ⊙ σ(U h)) + b of h, and their softmax pooling of h.

    Ilse et al. 2018, eq. 9.

    Args:
        dim: Of x.
        width: Of h; the gate is half as wide.
        classes: Attentions C.
        dropout: Probability of dropping an entry of the gate while training.
    """

    def __init__(self, dim: int, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width)
        gate = (width + 1) // 2
        self.V, self.U = nn.Linear(width, gate), nn.Linear(width, gate)
        self.w = nn.Linear(gate, classes)
        self.dropout = dropout

    def forward(self, x: Tensor, bags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled [B, C, width], lse [B, C] and scores [N, C] of the kernel."""
        return gated_attention_pool(
            x,
            self.V.weight,
            self.V.bias,
            self.U.weight,
            self.U.bias,
            self.w.weight,
            self.w.bias,
            bags,
            reduce=(self.embed.weight, self.embed.bias),
            dropout=self.dropout if self.training else 0.0,
        )


class ABMIL(nn.Module):
    """ABMIL with the gate (Ilse, Tomczak, Welling, ICML 2018), one head per level of the tree.

    h_i = ReLU(W x_i + b), one attention over the bag, Linear heads on the pooled h. Every node of
    the tree has the same attention map.

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
        self.attention = GatedAttention(dim, hidden, 1, dropout)
        self.heads = nn.ModuleList(nn.Linear(hidden, classes) for classes in num_classes)

    def forward(self, x: Tensor, bags: Tensor, targets: Tensor | None = None) -> HmilOutput:
        """Predict packed bags; arguments as for `HMIL.forward`. An empty bag pools to 0.

        While training the output holds no attention: there is no second one to align it with.
        """
        pooled, lse, scores = self.attention(features(x, self.dim), bags)
        with torch.autocast(x.device.type, enabled=False):
            logits = tuple(head(pooled.squeeze(1)) for head in self.heads)
        if self.training:
            return HmilOutput(logits, (), (), None)
        maps = tuple(scores[: x.shape[0]].expand(-1, k) for k in self.num_classes)
        return HmilOutput(logits, maps, tuple(lse.expand(-1, k) for k in self.num_classes), None)
