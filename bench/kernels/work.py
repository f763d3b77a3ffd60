"""Make the inputs of a case and a function for each implementation to compare."""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.kernels import machine, rivals
from bench.kernels.cases import Case
from bench.kernels.counts import CLASSES, CORE, EMBEDDING, FEATURES, POOL
from hmil_fast.kernels.gated_attention_pool import gated_attention_pool
from hmil_fast.kernels.hierarchy_alignment import hierarchy_alignment
from hmil_fast.kernels.supcon import supcon
from hmil_fast.kernels.supcon.reference import supcon_reference
from hmil_fast.models.hmil import HMIL

Inputs = tuple[Tensor, ...]
Forward = Callable[[Inputs], list[Tensor]]

ROTATED = 256 << 20  # bytes of inputs taken in turns: more than any cache holds
PARENT = (0, 0, 0, 1, 1, 2, 2)
TEMPERATURE = 0.1


@dataclass
class Rival:
    """One way to work a case out.

    Attributes:
        forward: From its inputs to its results.
        prepare: Its inputs from those of the case, outside the clock.
        kernels: The value of HMIL_KERNELS, for ours.
        elements: About how many elements it holds per instance at its peak.
    """

    forward: Forward
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs
    kernels: str = "reference"
    elements: float = 0.0


@dataclass
class Work:
    """The rivals of a case by name, over the same inputs.

    Attributes:
        inputs: Inputs taken in turns.
        rivals: The first of them is what the others' results are compared with.
        loss: Of the results.
        weights: What wants a gradient beside the inputs that do.
    """

    inputs: list[Inputs]
    rivals: dict[str, Rival]
    loss: Callable[[list[Tensor]], Tensor]
    weights: list[Tensor] = field(default_factory=list)

    def runner(self, name: str, phase: str) -> Callable[[int], list[Tensor]]:
        """A function that runs a rival on the i-th inputs; results, then gradients."""
        rival = self.rivals[name]
        prepared = [rival.prepare(inputs) for inputs in self.inputs]

        def forward(i: int) -> list[Tensor]:
            with torch.no_grad():
                return rival.forward(prepared[i % len(prepared)])

        def step(i: int) -> list[Tensor]:
            inputs = prepared[i % len(prepared)]
            results = rival.forward(inputs)
            wanted = [*self.weights, *(t for t in inputs if t.requires_grad)]
            return [*results, *torch.autograd.grad(self.loss(results), wanted)]

        return forward if phase == "forward" else step


def build(case: Case) -> Work:
    """Make the inputs and the rivals of a case."""
    torch.manual_seed(0)
    kind = machine.set_precision(case.dtype)
    make = {"hmil": _hmil, "alignment": _alignment, "supcon": _supcon}.get(case.family, _pool)
    work = make(case, kind)
    if machine.device().type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        ours = work.rivals["ours"]
        work.rivals["fused"] = Rival(ours.forward, ours.prepare, kernels="fused")
    return work


@functools.lru_cache(maxsize=1)
def _shared(group: tuple[str, str, str]) -> dict[str, Any]:
    """Weights and compiled functions of a group, until the next group."""
    torch._dynamo.reset()
    return {}


def _model(case: Case, make: Callable[[], nn.Module]) -> Any:
    shared = _shared(case.group)
    if "model" not in shared:
        shared["model"] = make().to(machine.device())
    return shared["model"]


def _compiled(case: Case, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    shared = _shared(case.group)
    return shared.setdefault(name, torch.compile(function, fullgraph=True))


def _rotated(case: Case, make: Callable[[], Inputs], bytes_each: float) -> list[Inputs]:
    """On a GPU enough inputs that its cache holds none of them when its turn comes."""
    gpu = machine.device().type == "cuda"
    inputs = [make() for _ in range(min(max(int(ROTATED / bytes_each), 1), 64) if gpu else 1)]
    for tensors in inputs:
        torch._dynamo.maybe_mark_dynamic(tensors[0], 0)
    return inputs


def _autocast(case: Case) -> AbstractContextManager[Any]:
    if case.dtype != "bf16":
        return nullcontext()
    return torch.autocast(machine.device().type, torch.bfloat16)


def _spans(lengths: list[int]) -> Tensor:
    sizes = torch.tensor(lengths)
    return torch.stack([sizes.cumsum(0) - sizes, sizes], 1)


def _hmil(case: Case, kind: torch.dtype) -> Work:
    """Features and weights as in training: under autocast for bf16."""
    where, lengths = machine.device(), case.lengths()
    model = _model(case, lambda: HMIL(FEATURES, CLASSES))
    bags = _spans(lengths)
    targets = [torch.arange(case.bags, device=where) % k for k in CLASSES]
    one = case.bags == 1

    def unfolded_whole(x: Tensor) -> list[Tensor]:
        return rivals.classified(model, rivals.pooled(rivals.unfolded(model, x), [len(x)]))

    def folded_whole(x: Tensor) -> list[Tensor]:
        scored, maps = rivals.folded(model, x)
        means = rivals.mapped(rivals.pooled(scored, [len(x)]), maps, CLASSES)
        return rivals.classified(model, means)

    def packed(score: Callable[..., rivals.Scored]) -> Callable[[Tensor], list[Tensor]]:
        return lambda x: rivals.classified(model, rivals.pooled(score(model, x), lengths))

    def packed_folded(score: Callable[..., Any]) -> Callable[[Tensor], list[Tensor]]:
        def run(x: Tensor) -> list[Tensor]:
            scored, maps = score(model, x)
            means = rivals.mapped(rivals.pooled(scored, lengths), maps, CLASSES)
            return rivals.classified(model, means)

        return run

    def by_bag(x: Tensor) -> list[Tensor]:
        found = [unfolded_whole(rows) for rows in x.split(lengths)]
        return [torch.cat(level) for level in zip(*found, strict=True)]

    def under(run: Callable[..., list[Tensor]]) -> Forward:
        def forward(inputs: Inputs) -> list[Tensor]:
            with _autocast(case):
                return [t.float() for t in run(*inputs)]

        return forward

    if one:
        compiled = _compiled(case, "clean whole", unfolded_whole)
        folded_compiled = _compiled(case, "folded whole", folded_whole)
    else:
        compiled = packed(_compiled(case, "clean", rivals.unfolded))
        folded_compiled = packed_folded(_compiled(case, "folded", rivals.folded))
    training = case.phase == "step"
    held, held_folded = (5000, 2200) if training else (3000, 1300)
    found = {
        "clean": Rival(under(packed(rivals.unfolded)), elements=held),
        "clean compile": Rival(under(compiled), elements=held),
        "folded": Rival(under(packed_folded(rivals.folded)), elements=held_folded),
        "folded compile": Rival(under(folded_compiled), elements=held_folded),
    }
    if not one:
        padding = len(lengths) * max(lengths) / case.rows

        def padded(x: Tensor, mask: Tensor) -> list[Tensor]:
            means = rivals.pooled_padded(rivals.unfolded(model, x), mask)
            return rivals.classified(model, means)

        found["padded"] = Rival(
            under(padded), lambda i: rivals.pad(i[0], lengths), elements=padding * (held + FEATURES)
        )
        found["by bag"] = Rival(under(by_bag), elements=held)
    found["ours"] = Rival(under(lambda x: list(model(x, bags).logits)))

    def loss(logits: list[Tensor]) -> Tensor:
        return sum(
            (F.cross_entropy(level, t) for level, t in zip(logits, targets, strict=True)),
            start=torch.zeros((), device=where),
        )

    inputs = _rotated(
        case,
        lambda: (torch.randn(case.rows, FEATURES, device=where, dtype=kind),),
        case.rows * FEATURES * kind.itemsize,
    )
    return Work(inputs, found, loss, list(model.parameters()))


def _pool(case: Case, kind: torch.dtype) -> Work:
    """Gated attention pooling alone; in "core" the rows want a gradient too."""
    where, lengths = machine.device(), case.lengths()
    core = case.family == "core"
    shape = CORE if core else POOL
    model = _model(case, lambda: rivals.GatedPool(shape).to(kind))
    bags = _spans(lengths)
    weight = torch.randn(case.bags, shape[2], shape[0], device=where)

    def whole(x: Tensor) -> list[Tensor]:
        return rivals.pooled(model(x), [len(x)])

    def padded(inputs: Inputs) -> Inputs:
        rows, mask = rivals.pad(inputs[0], lengths)
        return rows.requires_grad_(inputs[0].requires_grad), mask

    if case.bags == 1:
        compiled = _compiled(case, "whole", whole)
    else:
        rows = _compiled(case, "rows", model.forward)
        compiled = lambda x: rivals.pooled(rows(x), lengths)  # noqa: E731
    held = shape[0] * 2 + shape[1] * (5 if case.phase == "step" else 4)
    # the core's formula is what the fold leaves of HMIL
    name = "folded" if core else "clean"
    found = {
        name: Rival(lambda i: rivals.pooled(model(i[0]), lengths), elements=held),
        f"{name} compile": Rival(lambda i: compiled(i[0]), elements=held),
    }
    if case.bags > 1:
        padding = len(lengths) * max(lengths) / case.rows
        found["padded"] = Rival(
            lambda i: rivals.pooled_padded(model(i[0]), i[1]),
            padded,
            elements=padding * (held + shape[0]),
        )
    found["ours"] = Rival(lambda i: [gated_attention_pool(i[0], *model.weights(), bags)[0]])
    inputs = _rotated(
        case,
        lambda: (torch.randn(case.rows, shape[0], device=where, dtype=kind).requires_grad_(core),),
        case.rows * shape[0] * kind.itemsize,
    )
    return Work(inputs, found, lambda r: (r[0].float() * weight).sum(), list(model.parameters()))


def _alignment(case: Case, kind: torch.dtype) -> Work:
    where, lengths = machine.device(), case.lengths()
    bags, parent = _spans(lengths), torch.tensor(PARENT, device=where)
    children = F.one_hot(parent, CLASSES[0]).to(kind)
    bag = None
    if case.bags > 1:
        bag = torch.arange(case.bags).repeat_interleave(torch.tensor(lengths)).to(where)
        torch._dynamo.maybe_mark_dynamic(bag, 0)

    def make() -> Inputs:
        levels = []
        for k in CLASSES:
            logits = torch.randn(case.rows, k, device=where)
            lse = torch.stack([s.logsumexp(0) for s in logits.split(lengths)])
            levels += [logits.requires_grad_(), lse.requires_grad_()]
        torch._dynamo.maybe_mark_dynamic(levels[2], 0)
        return tuple(levels)

    def clean(inputs: Inputs) -> list[Tensor]:
        return [rivals.alignment(inputs, children, bag, case.bags)]  # type: ignore[arg-type]

    compiled = _compiled(case, "packed" if case.bags > 1 else "whole", rivals.alignment)
    found = {
        "clean": Rival(clean, elements=120),
        "clean compile": Rival(lambda i: [compiled(i, children, bag, case.bags)], elements=120),
        "ours": Rival(lambda i: [hierarchy_alignment(*i, parent, bags)]),
    }
    inputs = _rotated(case, make, case.rows * sum(CLASSES) * 4)
    return Work(inputs, found, lambda r: r[0].sum())


def _supcon(case: Case, kind: torch.dtype) -> Work:
    where = machine.device()
    labels = torch.arange(case.rows, device=where) % CLASSES[1]
    torch._dynamo.maybe_mark_dynamic(labels, 0)

    def make() -> Inputs:
        z = torch.randn(case.rows, EMBEDDING, device=where)
        return (F.normalize(z, dim=1).requires_grad_(),)

    compiled = _compiled(case, "dense", supcon_reference)
    held = case.rows * (7 if case.phase == "step" else 4)  # matrices of [R, R]
    found = {
        "clean": Rival(lambda i: [supcon_reference(i[0], labels, TEMPERATURE, 0.0)], elements=held),
        "clean compile": Rival(
            lambda i: [compiled(i[0], labels, TEMPERATURE, 0.0)], elements=held / 2
        ),
        "ours": Rival(lambda i: [supcon(i[0], labels, TEMPERATURE)]),
    }
    inputs = _rotated(case, make, case.rows * EMBEDDING * 4)
    return Work(inputs, found, lambda r: r[0])
