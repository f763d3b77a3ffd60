"""Gated attention pooling of packed bags (Ilse et al. 2018, eq. 9), one attention per class."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hmil_fast.kernels.bags import as_bags, check_bags
from hmil_fast.kernels.dispatch import choose
from hmil_fast.kernels.gated_attention_pool.op import pool
from hmil_fast.kernels.gated_attention_pool.reference import pool_reference
from hmil_fast.kernels.gated_attention_pool.streaming import pool_streaming

__all__ = ["gated_attention_pool"]


def gated_attention_pool(  # noqa: PLR0913 - the operands of one formula
    x: Tensor,
    V: Tensor,
    bv: Tensor,
    U: Tensor,
    bu: Tensor,
    Wc: Tensor,
    bc: Tensor,
    bags: Tensor,
    *,
    reduce: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool every bag once per class, with gated attention.

    s = Wc (tanh(V x + bv) ⊙ σ(U x + bu)) + bc, a = softmax of s over the instances of a bag,
    pooled = Σ a x.

    Sums, logits and results are float32 whatever the input dtype, float64 if an input is float64.
    A bag of NaNs changes no other bag.

    On a CPU tile by tile in torch, on a GPU in Triton (`hmil_fast.kernels.dispatch` says which and
    why), for any bags that do not overlap and up to 32 classes; others run as on a CPU. The Triton
    kernels take V, U and, for the scores, Wc in the dtype of x; beside bfloat16 x the gradients too
    are multiplied in it, beside float16 x in tf32. They multiply float32 as
    `torch.get_float32_matmul_precision` says: in three products of tf32, or in one. A CPU
    multiplies bfloat16 x as such where it has instructions for it, else all in float32.

    Short bags that follow one another in x are worked on together by a CPU; put them so. There a
    bag of 4096 rows or more is worked on alone, in tiles that begin at its first row: on one
    machine and number of threads it gives bitwise the same pooled, lse and logits alone, packed
    with others, or elsewhere in x (without dropout; if its rows stay aligned to 64 bytes). A
    shorter bag gives the same to rounding, some 1e-6 of the largest value in float32. In Triton
    every bag gives bitwise the same (if x stays aligned to 16 bytes), and so does every run.

    Args:
        x: [N, D], the instances of all bags.
        V: [H, D], weight inside the tanh.
        bv: [H].
        U: [H, D], weight inside the sigmoid.
        bu: [H].
        Wc: [C, H], one row per class; rows may be block-diagonal to hold several gates.
        bc: [C].
        bags: int64 [B, 2], (start, length) of each bag in x, in any order; keep it on the CPU.
            Bags may leave rows out, overlap, and be empty. Or the bounds [B + 1] of bags that
            follow one another (cu_seqlens); int32 is taken too.
        reduce: W1 [D, D'] and b1 [D]: x is [N, D'], and ReLU(W1 x + b1) takes its place in the
            formula, multiplied in the dtype of the autocast if there is one, else of W1. On a CPU
            it exists tile by tile only, so that no temporary grows with N.
        dropout: Probability of dropping an entry of tanh(·) ⊙ σ(·); the others are scaled up. The
            Triton kernels do not drop: torch serves then.

    Returns:
        pooled [B, C, D], lse [B, C] (log Σ exp s per bag), logits s [N, C]. The attention of
        instance i in bag b is exp(logits[i] − lse[b]). An empty bag has pooled 0, lse −inf and no
        gradient; rows in no bag have logits 0 and no gradient. Differentiable once, with respect
        to every float operand.

    Raises:
        ValueError: Operands that do not fit together, a bag outside x, or a bad dropout.
    """
    operands = {"x": x, "V": V, "bv": bv, "U": U, "bu": bu, "Wc": Wc, "bc": bc}
    _check(operands, reduce, dropout)
    bags = as_bags(bags)
    operands |= {} if reduce is None else {"W1": reduce[0], "b1": reduce[1]}
    double = any(t.dtype == torch.float64 for t in operands.values())
    dtype = torch.float64 if double else torch.float32
    products = _products(x, reduce)
    # beside the op in eager mode: it may keep the gates for the backward pass
    streamed = not torch.compiler.is_compiling() and (
        dropout > 0 or choose(x.device).name == "reference"
    )
    # the sums stay in float32 under autocast too
    with torch.autocast(x.device.type, enabled=False):
        if reduce is not None and (not streamed or x.is_cuda):
            x = torch.relu(F.linear(x.to(products), *(t.to(products) for t in reduce)))
            reduce = None
        weights = [t.to(dtype) for t in (V, bv, U, bu, Wc, bc)]
        if streamed:
            first = None if reduce is None else (reduce[0].to(dtype), reduce[1].to(dtype))
            spans = check_bags(bags, x.shape[0])
            return pool_streaming(x, weights, spans, first, products, dropout)
        if dropout:  # beside torch.compile
            return pool_reference(x.to(dtype), weights, check_bags(bags, x.shape[0]), dropout)
        V, bv, U, bu, Wc, bc = weights
        pooled, lse, logits = pool(x, torch.stack([V, U]), torch.stack([bv, bu]), Wc, bc, bags)
        return pooled, lse, logits


def _products(x: Tensor, reduce: tuple[Tensor, Tensor] | None) -> torch.dtype:
    """The dtype that rows are multiplied in: of x, or as F.linear would with W1."""
    if reduce is None:
        return x.dtype
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return reduce[0].dtype


def _check(
    operands: dict[str, Tensor], reduce: tuple[Tensor, Tensor] | None, dropout: float
) -> None:
    x, V, Wc = operands["x"], operands["V"], operands["Wc"]
    if reduce is not None:
        operands = operands | {"W1": reduce[0], "b1": reduce[1]}
    for name in ("x", "V", "Wc", "W1"):
        if name in operands and operands[name].ndim != 2:
            raise ValueError(
                f"{name} has shape {list(operands[name].shape)}; give a tensor of 2 dimensions"
            )
    hidden, dim, classes = V.shape[0], V.shape[1], Wc.shape[0]
    if reduce is None:
        wanted, dim = {}, x.shape[1]
    else:
        wanted = {"W1": [dim, x.shape[1]], "b1": [dim]}
    wanted |= {
        "V": [hidden, dim],
        "bv": [hidden],
        "U": [hidden, dim],
        "bu": [hidden],
        "Wc": [classes, hidden],
        "bc": [classes],
    }
    for name, shape in wanted.items():
        if list(operands[name].shape) != shape:
            raise ValueError(
                f"{name} has shape {list(operands[name].shape)}, but x is [N, {x.shape[1]}], V "
                f"[{hidden}, {V.shape[1]}] and Wc [{classes}, ·]; give {name} the shape {shape}"
            )
    for name, tensor in operands.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; cast it to a floating-point dtype")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; move {name} there")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; give a probability in [0, 1)")
