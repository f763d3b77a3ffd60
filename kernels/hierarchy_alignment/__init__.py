"""Hierarchy alignment loss: 1 − cosine of parent and summed child attention, per instance."""

import torch
from torch import Tensor

from hmil_fast.kernels.bags import as_bags
from hmil_fast.kernels.hierarchy_alignment.op import alignment

__all__ = ["hierarchy_alignment"]


def hierarchy_alignment(
    coarse_logits: Tensor,
    coarse_lse: Tensor,
    fine_logits: Tensor,
    fine_lse: Tensor,
    parent: Tensor,
    bags: Tensor,
    *,
    average: bool = False,
) -> Tensor:
    """1 − cosine between coarse attention and the children's, averaged over each bag's instances.

    With A = exp(logits − lse of the bag) and S_c = Σ A² over the children of c (or their mean), the
    value of a bag is mean_i (1 − cos_c(A¹_ic, S_ic)), the cosine taken over the coarse classes.
    Every instance's attention is scaled by its own largest entry before the exponential, so
    the result stays exact where attention underflows or where norms fall below the 1e-8 at which
    torch's cosine_similarity clamps (large bags, peaky attention).

    Args:
        coarse_logits: [N, Cc], as `gated_attention_pool` returns them.
        coarse_lse: [B, Cc].
        fine_logits: [N, Cf].
        fine_lse: [B, Cf].
        parent: int64 [Cf], the coarse class of each fine class.
        bags: int64 [B, 2], (start, length) of each bag, or their bounds [B + 1]; keep it on the
            CPU.
        average: Mean over the children instead of the sum. Only then can uniform attention reach 0
            when children counts differ.

    Returns:
        [B], in [0, 1]; 0 with zero gradient for an empty bag. float32, float64 if an input is.
        Instances are worked on in chunks: beside the result and the gradients it takes no memory
        that grows with N. Differentiable once.

    Raises:
        ValueError: Operands that do not fit together, or a bag outside the rows.
    """
    bags = as_bags(bags)
    operands = {
        "coarse_logits": coarse_logits,
        "coarse_lse": coarse_lse,
        "fine_logits": fine_logits,
        "fine_lse": fine_lse,
    }
    _check(operands, parent, bags)
    double = any(t.dtype == torch.float64 for t in operands.values())
    dtype = torch.float64 if double else torch.float32
    levels = [t.to(dtype) for t in operands.values()]
    value: Tensor = alignment(*levels, parent, bags, average)
    return value


def _check(operands: dict[str, Tensor], parent: Tensor, bags: Tensor) -> None:
    coarse, fine = operands["coarse_logits"], operands["fine_logits"]
    for name, tensor in operands.items():
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; give a float matrix, one row per "
                "instance (logits) or bag (lse)"
            )
    if fine.shape[0] != coarse.shape[0]:
        raise ValueError(
            f"fine_logits has {fine.shape[0]} rows, coarse_logits {coarse.shape[0]}; "
            "give both for the same instances"
        )
    for name, level in (("coarse_lse", coarse), ("fine_lse", fine)):
        if list(operands[name].shape) != [bags.shape[0], level.shape[1]]:
            raise ValueError(
                f"{name} has shape {list(operands[name].shape)}; give one row per bag and one "
                f"column per class, {[bags.shape[0], level.shape[1]]}"
            )
    if parent.dtype != torch.int64 or list(parent.shape) != [fine.shape[1]]:
        raise ValueError(
            f"parent is {parent.dtype} {list(parent.shape)}; give int64 [{fine.shape[1]}], the "
            "coarse class of each fine class"
        )
    for name, tensor in (*operands.items(), ("parent", parent)):
        if tensor.device != coarse.device:
            raise ValueError(
                f"{name} is on {tensor.device}, coarse_logits on {coarse.device}; move {name} there"
            )
