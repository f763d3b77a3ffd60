"""HAM, the instance alignment of HMIL: attentions of adjacent levels agree on the instances."""

from torch import Tensor

from hmil_fast.kernels.hierarchy_alignment import hierarchy_alignment


def instance_alignment(
    attention_logits: tuple[Tensor, ...],
    lse: tuple[Tensor, ...],
    parents: tuple[Tensor, ...],
    bags: Tensor,
    average: bool = False,
) -> list[Tensor]:
    """Compute, per pair of adjacent levels, 1 − cosine of the attentions, mean over bags.

    The paper sums the children's rows. If numbers of children differ, uniform attention then gives
    a little more than 0 (0.0198 for 3, 2, 2); with the mean it gives 0.

    Args:
        attention_logits: [N, K_l] per level, coarse first.
        lse: [B, K_l] per level.
        parents: int64 [K_l] per level below the first.
        bags: int64 [B, 2], (start, length) of each bag.
        average: Mean over the children's rows instead of their sum.
    """
    return [
        hierarchy_alignment(
            attention_logits[l],
            lse[l],
            attention_logits[l + 1],
            lse[l + 1],
            parent,
            bags,
            average=average,
        ).mean()
        for l, parent in enumerate(parents)
    ]
