"""SupCon of all levels against the batch and a memory, with its gradient, in one pass.

The value is a sum of few small products, whose gradient is written out here: autograd would keep
and launch some two hundred operations for it in every step.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hmil_fast.kernels.supcon.op import supcon_lse, supcon_lse_backward
from hmil_fast.losses.memory import Past


class Nodes(NamedTuple):
    """The nodes of all levels side by side, M in all.

    Attributes:
        member: [K, M], 1 where a leaf lies below a node.
        level: [M, L], 1 where a node is of a level.
    """

    member: Tensor
    level: Tensor


def nodes_of(ancestors: Tensor) -> Nodes:
    """The nodes of a tree, float64, from the node of every leaf per level, int64 [L, K]."""
    sizes = [int(level.max()) + 1 for level in ancestors]
    below = [level[:, None] == torch.arange(n) for level, n in zip(ancestors, sizes, strict=True)]
    level = torch.repeat_interleave(torch.eye(len(sizes)), torch.tensor(sizes), 0)
    return Nodes(torch.cat(below, 1).double(), level.double())


def supcon_with_memory(
    z: Tensor, leaf: Tensor, past: Past, nodes: Nodes, weights: Tensor, temperature: float
) -> Tensor:
    """The weighted sum of the levels' SupCon, with the rows z as anchors.

    Each row of the batch is contrasted with the other rows of the batch and with the memory. The
    memory's rows are not anchors and get no gradient. Differentiable once, with respect to z.

    Args:
        z: [R, E].
        leaf: int64 [R].
        past: The memory's content.
        nodes: Of the tree, on the device.
        weights: [L], of the levels.
        temperature: τ > 0.

    Returns:
        A scalar, float32 (float64 if z is).
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        member, level = (part.to(z.dtype) for part in nodes)
        own = member[leaf]
        theirs = member[past.leaf] * past.filled[:, None]
        lowest = torch.finfo(z.dtype).min  # not −inf: an empty memory must not make NaN gradients
        value: Tensor = _Contrast.apply(
            z,
            (own, theirs, past.rows.to(z.dtype), ~past.filled),
            (level, weights.to(z.dtype)),
            (temperature, lowest),
        )
        return value


class _Contrast(torch.autograd.Function):
    """Value = Σ_i g_i lse_i − Σ_il b_il (z_i·S_node(l, i) − |z_i|²), S the sums of the nodes' rows.

    With c_il = weight_l / anchors of l, 0 for a row without positives there: g_i = Σ_l c_il and
    b_il = c_il / (τ · positives_il).
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        rows: tuple[Tensor, Tensor, Tensor, Tensor],
        levels: tuple[Tensor, Tensor],
        scalars: tuple[float, float],
    ) -> Tensor:
        (own, theirs, held, empty), (level, weights), (tau, lowest) = rows, levels, scalars
        sums = torch.addmm(theirs.T @ held, own.T, z)  # [M, E]
        count = own.sum(0) + theirs.sum(0)
        positives = torch.addmm(z.new_full((), -1.0), own * count, level)  # [R, L]
        anchor = (positives > 0).to(z.dtype)
        c = anchor * (weights / anchor.sum(0).clamp_min(1))
        b = c / positives.clamp_min(1) / tau
        g, own_b = c.sum(1), own * (b @ level.T)
        apart = (z @ held.T).div_(tau).masked_fill_(empty, lowest)
        log_sum = torch.logsumexp(apart, 1)
        lse = supcon_lse(z, tau) if len(z) > 1 else None
        if lse is not None:
            log_sum = torch.logaddexp(log_sum, lse)
        per_row = b.sum(1)
        pull = ((z @ sums.T) * own_b).sum() - per_row @ z.square().sum(1)
        if ctx.needs_input_grad[0]:
            share = apart.sub_(log_sum[:, None]).exp_().mul_((g / tau)[:, None])
            d_z = share @ held
            d_z.addmm_(own_b, sums, alpha=-1).addmm_(own, own_b.T @ z, alpha=-1)
            d_z.addcmul_(z, per_row[:, None], value=2)
            if lse is not None:
                d_z += supcon_lse_backward(g * (lse - log_sum).exp_(), z, lse, tau)
            ctx.save_for_backward(d_z)
        return g @ log_sum - pull

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (d_z,) = ctx.saved_tensors
        return d_z * grad, None, None, None
