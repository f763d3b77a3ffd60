"""FlatHMIL: HMIL on the leaves alone, to measure what the upper levels add."""

import torch
from torch import Tensor, nn

from hmil_fast.models.hmil import HMIL
from hmil_fast.models.output import HmilOutput, sum_children, summed_logits
from hmil_fast.models.segments import segments


class FlatHMIL(nn.Module):
    """HMIL of one level, the leaves; a node above has the summed probability of its children.

    Its attention is the mean of its leaves' attentions.

    Args:
        dim: Feature dimension D.
        num_classes: Nodes per level of the label tree, coarse first.
        parents: Per level below the first, the parent of each node.
        hidden: As for `HMIL`.
        dropout: As for `HMIL`.
        readout: As for `HMIL`.

    Raises:
        ValueError: The parents do not fit num_classes.
    """

    def __init__(
        self,
        dim: int,
        num_classes: tuple[int, ...],
        parents: tuple[tuple[int, ...], ...],
        *,
        hidden: int = 256,
        dropout: float = 0.0,
        readout: str = "paper",
    ) -> None:
        super().__init__()
        self.leaves = HMIL(dim, num_classes[-1:], hidden=hidden, dropout=dropout, readout=readout)
        pairs = list(zip(parents, num_classes[:-1], strict=False))
        if [len(parent) for parent in parents] != list(num_classes[1:]) or any(
            set(parent) != set(range(above)) for parent, above in pairs
        ):
            raise ValueError(
                f"the parents {parents} do not fit the classes {num_classes} per level; give "
                "those of the label tree"
            )
        self.num_classes = tuple(num_classes)
        for l, parent in enumerate(parents):
            self.register_buffer(f"parent{l}", torch.tensor(parent), persistent=False)

    def forward(self, x: Tensor, bags: Tensor, targets: Tensor | None = None) -> HmilOutput:
        """Predict packed bags; arguments as for `HMIL.forward`.

        While training the output holds no attention: there is no second one to align it with.
        """
        out = self.leaves(x, bags)
        parents = [self.get_buffer(f"parent{l}") for l in range(len(self.num_classes) - 1)]
        logits = summed_logits(out.logits[0], parents, top=self.num_classes[0])
        if self.training:
            return HmilOutput(logits, (), (), out.embeddings)
        parts = segments(bags, x.shape[0], x.device)
        maps, lse = [out.attention_logits[0]], [out.lse[0]]
        summed = maps[0] - parts.spread(torch.where(parts.filled, lse[0], 0))  # log of attentions
        leaves = summed.new_ones(self.num_classes[-1])
        for parent, count in zip(reversed(parents), reversed(self.num_classes[:-1]), strict=True):
            summed = sum_children(summed, parent, count)
            leaves = leaves.new_zeros(count).index_add(0, parent, leaves)
            maps.append(summed)
            lse.append(torch.where(parts.filled, leaves.log(), -torch.inf))
        return HmilOutput(logits, tuple(reversed(maps)), tuple(reversed(lse)), out.embeddings)
