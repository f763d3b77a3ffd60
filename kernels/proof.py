"""Compare every fused kernel with float64 on the device at hand, forward and backward.

A few small bags suffice: what a driver, a compiler or a GPU gets wrong is a whole tile, block or
bag, not a digit. `hmil_fast.kernels.verdict` runs this file in a process of its own.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hmil_fast.kernels.bags import Spans
from hmil_fast.kernels.dispatch import exact_products, interpreted
from hmil_fast.kernels.gated_attention_pool.reference import pool_reference
from hmil_fast.kernels.hierarchy_alignment.reference import alignment_reference

# The largest RMS of an error over the RMS of its truth, by the kind of products. It leaves room for
# 20 unit roundoffs, of bf16 10: three products of tf32 in place of one round to 2⁻²¹, tf32 and fp16
# to 2⁻¹¹, bf16 to 2⁻⁹; an output is the last of several rounded steps, whose errors of random sign
# hardly add up (some 2 roundoffs in Triton's interpreter). And it is far below what one wrong row
# makes of a result with a row an instance: 0.047 of 452 rows.
_ALLOWED = {"fp32": 1e-5, "tf32": 1e-2, "fp16": 1e-2, "bf16": 2e-2}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # float32 without an entry
# no instance, one, less than a tile, and not a multiple of a tile, whose rows are 64 to 256
_LENGTHS = (130, 0, 1, 64, 257)
_BETWEEN = 3  # rows in no bag, before each: what is written there shows
# D, H, C: both levels of HMIL at once, and attention on wider and narrower features: whole rows of
# up to 512 fit shared memory, and a kernel may be compiled for each width; over 16 classes run in
# another configuration
_SHAPES = ((256, 320, 10), (1024, 256, 20), (512, 256, 20), (128, 64, 10))
_SHAPES_INTERPRETED = ((40, 48, 17),)
_PARENT = (0, 0, 0, 1, 1, 2, 2)
_VIEWS, _VIEWS_INTERPRETED = (300, 256), (90, 40)  # rows of SupCon, not a multiple of a block

Operation = tuple[Callable[..., Any], Callable[..., Any]]  # forward, backward
Outputs = dict[str, tuple[Tensor, Tensor]]  # ours and the truth, by name


class Measure(NamedTuple):
    """How far one output of a fused kernel is from float64.

    Attributes:
        case: The operation, its shape and the dtype of its products.
        output: A result, or the gradient of an operand.
        error: RMS of the difference over RMS of the truth; NaN where an output is NaN.
        allowed: The largest error that passes.
    """

    case: str
    output: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; NaN never is."""
        return self.error <= self.allowed


def operations() -> dict[str, Operation]:
    """The fused operations, called past the choice between them and the reference."""
    from hmil_fast.kernels.gated_attention_pool import fused as pool
    from hmil_fast.kernels.hierarchy_alignment import fused as alignment
    from hmil_fast.kernels.supcon import fused as supcon

    return {
        "gated_attention_pool": (pool.forward, pool.backward),
        "hierarchy_alignment": (alignment.alignment_fused, alignment.alignment_fused_backward),
        "supcon": (supcon.lse_fused, supcon.lse_fused_backward),
    }


def measure(
    device: torch.device, fused: dict[str, Operation] | None = None
) -> tuple[list[Measure], str]:
    """Run each fused operation forward and backward, and compare all outputs with float64.

    Products of float32 are as exact as torch is set to.

    Args:
        device: A GPU; or the CPU in a process with TRITON_INTERPRET=1, where the bags are the same
            and the rows narrower.
        fused: In place of `operations()`; some of them, or others.

    Returns:
        The measures, and what was raised by the first operation that failed, which ends the check:
        a GPU answers no more after a fault. Empty if none did.
    """
    found: list[Measure] = []
    case = "start"
    try:
        for case, kind, outputs in _cases(device, fused or operations()):
            found += [
                Measure(case, name, _error(*pair), _ALLOWED[kind])
                for name, pair in outputs().items()
            ]
    except Exception as error:  # noqa: BLE001 - a compiler or a driver may raise anything
        return found, f"{case}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return found, ""


def _cases(
    device: torch.device, fused: dict[str, Operation]
) -> Iterator[tuple[str, str, Callable[[], Outputs]]]:
    """The name of each case, the kind of its products, and what runs it."""
    exact = interpreted() or exact_products()
    single = "fp32" if exact else "tf32"
    if pool := fused.get("gated_attention_pool"):
        for shape in _SHAPES_INTERPRETED if interpreted() else _SHAPES:
            size = "D={} H={} C={}".format(*shape)
            for kind in (single, "fp16", "bf16"):
                name = f"gated_attention_pool {size} {kind}"
                dtype = _DTYPES.get(kind, torch.float32)
                yield name, kind, partial(_pool, pool, shape, dtype, device)
    if alignment := fused.get("hierarchy_alignment"):
        yield "hierarchy_alignment fp32", "fp32", partial(_alignment, alignment, device)
    if supcon := fused.get("supcon"):
        yield f"supcon {single}", single, partial(_supcon, supcon, device)


def _pool(
    fused: Operation, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Outputs:
    (dim, hidden, classes), (spans, rows), draw = shape, _bags(), _draws()
    # rows and W as the kernel gets them: roundings of operands are not its errors
    operands = {
        "x": draw(rows, dim).to(dtype).float(),
        "W": draw(2, hidden, dim, scale=dim**-0.5).to(dtype).float(),
        "b": draw(2, hidden, scale=0.3),
        "Wc": draw(classes, hidden, scale=3 * hidden**-0.5),  # logits of some unit of spread
        "bc": draw(classes),
    }
    grads = [draw(len(spans), classes, dim), draw(len(spans), classes), draw(rows, classes)]

    def formula(x: Tensor, W: Tensor, b: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return pool_reference(x, [W[0], b[0], W[1], b[1], *others], spans)

    truth = _truth(formula, operands, ("pooled", "lse", "logits"), grads)
    x, *weights = (t.to(device) for t in operands.values())
    x = x.to(dtype)
    forward, backward = fused
    results = forward(x, weights, spans)
    grads = [t.to(device) for t in grads]
    found = [*results, *backward(x, weights, list(results), grads, spans, True)]
    outputs = _pairs(found, truth)
    # −inf where a bag is empty: there exp(lse) must be 0
    full = torch.tensor([length > 0 for _, length in spans])
    ours, theirs = outputs.pop("lse")
    outputs["lse"] = ours[full], theirs[full]
    outputs["exp(lse) of an empty bag"] = ours[~full].exp(), theirs[~full].exp()
    return outputs


def _alignment(fused: Operation, device: torch.device) -> Outputs:
    (spans, rows), draw, parent = _bags(), _draws(), torch.tensor(_PARENT)
    operands = {}
    for level, classes in (("coarse", max(_PARENT) + 1), ("fine", len(_PARENT))):
        logits = draw(rows, classes, scale=3.0)
        lse = [logits[start : start + length].logsumexp(0) for start, length in spans]
        operands[f"{level} logits"] = logits
        operands[f"{level} lse"] = torch.stack(lse).nan_to_num(neginf=0.0)  # of an empty bag
    grads = [draw(len(spans))]

    def formula(*given: Tensor) -> tuple[Tensor, ...]:
        return (alignment_reference(given[:2], given[2:], parent, spans, True),)  # type: ignore[arg-type]

    truth = _truth(formula, operands, ("loss",), grads)
    given = [t.to(device) for t in operands.values()]
    levels, there = (tuple(given[:2]), tuple(given[2:])), parent.to(device)
    forward, backward = fused
    loss = forward(*levels, there, spans, True)
    return _pairs([loss, *backward(grads[0].to(device), *levels, there, spans, True)], truth)


def _supcon(fused: Operation, device: torch.device) -> Outputs:
    draw, temperature = _draws(), 0.1
    z = F.normalize(draw(*(_VIEWS_INTERPRETED if interpreted() else _VIEWS)), dim=1)
    grads = [draw(len(z))]
    own = torch.eye(len(z), dtype=torch.bool)

    def formula(z: Tensor) -> tuple[Tensor, ...]:
        return ((z @ z.T / temperature).masked_fill(own, -torch.inf).logsumexp(1),)

    truth = _truth(formula, {"z": z}, ("lse",), grads)
    z = z.to(device)
    forward, backward = fused
    lse = forward(z, temperature)
    return _pairs([lse, backward(grads[0].to(device), z, lse, temperature)], truth)


def _truth(
    formula: Callable[..., tuple[Tensor, ...]],
    operands: dict[str, Tensor],
    names: tuple[str, ...],
    grads: list[Tensor],
) -> dict[str, Tensor]:
    """Results by their names and the operands' gradients, in float64 on the CPU."""
    given = [t.double().requires_grad_() for t in operands.values()]
    results = formula(*given)
    gradients = torch.autograd.grad(results, given, [t.double() for t in grads])
    named = {f"gradient of {k}": g for k, g in zip(operands, gradients, strict=True)}
    return dict(zip(names, results, strict=True)) | named


def _pairs(ours: list[Tensor], truth: dict[str, Tensor]) -> Outputs:
    return {
        name: (mine.detach().cpu().double().view_as(true), true.detach())
        for mine, (name, true) in zip(ours, truth.items(), strict=True)
    }


def _error(ours: Tensor, truth: Tensor) -> float:
    """RMS of the difference over RMS of the truth; where that is 0, any other value is too far."""
    gap, size = ((t.square().mean().sqrt()) for t in (ours - truth, truth))
    return float(gap / size.clamp_min(1e-30))


def _draws() -> Callable[..., Tensor]:
    """Normal numbers in float32, the same on every machine."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return draw


def _bags() -> tuple[Spans, int]:
    """The bags, and the number of rows that they lie in."""
    spans, end = [], 0
    for length in _LENGTHS:
        spans.append((end + _BETWEEN, length))
        end += _BETWEEN + length
    return spans, end + _BETWEEN


def main(device: str, precision: str) -> None:
    """Answer the process that asks: the measures and what was raised, as JSON, in the last line."""
    torch.set_float32_matmul_precision(precision)
    measures, raised = measure(torch.device(device))
    sys.stdout.write(json.dumps({"measures": measures, "raised": raised}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
