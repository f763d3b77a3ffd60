"""Check on a GPU what a CPU cannot; `python -m bench.kernels.prove [--sanitize]`.

Not a part of the benchmark: it takes no times, compute-sanitizer must be able to run a piece of it,
and a fault must not cost the benchmark its budget. Each proof runs in a process of its own. Without
a GPU it says so and ends; with TRITON_INTERPRET=1 the same code runs on tiny bags on a CPU.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.kernels.counts import CLASSES, CORE, POOL
from bench.kernels.machine import describe, device, rms_error, tidy
from hmil_fast.kernels.bags import check_bags
from hmil_fast.kernels.gated_attention_pool import gated_attention_pool
from hmil_fast.kernels.gated_attention_pool.reference import pool_reference
from hmil_fast.kernels.hierarchy_alignment import hierarchy_alignment
from hmil_fast.kernels.hierarchy_alignment.reference import alignment_reference
from hmil_fast.kernels.supcon import supcon
from hmil_fast.kernels.supcon.reference import supcon_reference

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PARENT = [0, 0, 0, 1, 1, 2, 2]
RUNS = 3 if INTERPRETED else 20
TIMEOUT = 280  # s a proof, compiling included
# RMS of the error over RMS of the truth, of every result and gradient
TOLERANCE = {"fp32": 1e-5, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}
KINDS = {
    "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip
Op = Callable[[list[Tensor]], list[Tensor]]
Pair = tuple[Op, Op, list[Tensor]]  # ours, the reference, operands in float32


def _lengths(small: bool) -> list[int]:
    if INTERPRETED:
        return [0, 1, 17, 5]
    return [0, 1, 130, 64] if small else [0, 1, 2, 127, 128, 129, 20_000, 389, 64]


def _bags(small: bool) -> Tensor:
    sizes = torch.tensor(_lengths(small))
    return torch.stack([sizes.cumsum(0) - sizes, sizes], 1)


def _randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(device())


def _pool(shape: tuple[int, int, int], small: bool) -> Pair:
    dim, hidden, classes = (32, 16, 3) if INTERPRETED else shape
    bags = _bags(small)
    rows = int(bags[:, 1].sum())
    full = bags[:, 1] > 0
    operands = [
        _randn(rows, dim),
        *(_randn(*s, scale=dim**-0.5) for s in ((hidden, dim), (hidden,)) * 2),
        _randn(classes, hidden, scale=hidden**-0.5),
        _randn(classes),
    ]

    def ours(given: list[Tensor]) -> list[Tensor]:
        pooled, lse, logits = gated_attention_pool(*given, bags)
        return [pooled, lse[full.to(lse.device)], logits]

    def truth(given: list[Tensor]) -> list[Tensor]:
        pooled, lse, logits = pool_reference(given[0], given[1:], check_bags(bags, rows))
        return [pooled, lse[full.to(lse.device)], logits]

    return ours, truth, operands


def _alignment(small: bool) -> Pair:
    bags = _bags(small)
    rows = int(bags[:, 1].sum())
    parent = torch.tensor(PARENT, device=device())
    operands = []
    for k in CLASSES:
        logits = _randn(rows, k, scale=3.0)
        sums = [s.logsumexp(0) for s in logits.split(_lengths(small))]
        operands += [logits, torch.stack(sums).nan_to_num(neginf=0.0)]

    def ours(given: list[Tensor]) -> list[Tensor]:
        return [hierarchy_alignment(*given, parent, bags)]

    def truth(given: list[Tensor]) -> list[Tensor]:
        pairs = (given[0], given[1]), (given[2], given[3])
        return [alignment_reference(*pairs, parent, check_bags(bags, rows), False)]

    return ours, truth, operands


def _supcon(small: bool) -> Pair:
    rows = 37 if INTERPRETED else 300 if small else 4099
    labels = torch.arange(rows, device=device()) % 7

    def ours(given: list[Tensor]) -> list[Tensor]:
        return [supcon(given[0], labels, 0.1)[None]]

    def truth(given: list[Tensor]) -> list[Tensor]:
        return [supcon_reference(given[0], labels, 0.1, 0.0)[None]]

    return ours, truth, [F.normalize(_randn(rows, 32 if INTERPRETED else 256), dim=1)]


OPS: dict[str, tuple[Callable[[bool], Pair], tuple[str, ...]]] = {
    "pool": (lambda small: _pool(POOL, small), ("fp32", "tf32", "fp16", "bf16")),
    "core": (lambda small: _pool(CORE, small), ("fp32", "tf32", "fp16", "bf16")),
    "alignment": (_alignment, ("fp32",)),
    "supcon": (_supcon, ("fp32", "tf32")),
}


def _run(op: Op, operands: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Results, then gradients of all operands under weights that are the same every time."""
    given = [t.to(dtype).detach().requires_grad_() for t in operands]
    results = op(given)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(t) for t in results]
    loss = sum(((r * w).sum() for r, w in zip(results, weights, strict=True)), results[0].sum() * 0)
    return [t.detach() for t in (*results, *torch.autograd.grad(loss, given))]


def _precision(dtype: str) -> torch.dtype:
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    return KINDS[dtype]


def numerics(name: str) -> str:
    """Every result and gradient against the reference in float64, of operands rounded alike."""
    make, dtypes = OPS[name]
    said = []
    for dtype in dtypes:
        torch.manual_seed(0)
        ours, reference, operands = make(False)
        kind = _precision(dtype)
        operands = [t.to(kind).float() for t in operands]
        found = _run(ours, operands, kind)
        truth = _run(reference, operands, torch.float64)
        errors = [rms_error(a, b) for a, b in zip(found, truth, strict=True)]
        worst = max(errors)  # NaN compares as false below
        said.append(f"{dtype} {worst:.1e}")
        if not all(error <= TOLERANCE[dtype] for error in errors):
            listed = ", ".join(f"{error:.1e}" for error in errors)
            raise AssertionError(f"{dtype}: errors {listed}, {TOLERANCE[dtype]:.0e} allowed")
    return "worst error over RMS of float64: " + ", ".join(said)


def determinism(name: str) -> str:
    """The same bits in every run."""
    make, dtypes = OPS[name]
    for dtype in dtypes:
        torch.manual_seed(0)
        ours, _, operands = make(False)
        kind = _precision(dtype)
        first = _run(ours, operands, kind)
        for run in range(1, RUNS):
            for k, (a, b) in enumerate(zip(_run(ours, operands, kind), first, strict=True)):
                if not torch.equal(a, b):
                    raise AssertionError(f"{dtype}: result {k} differs in run {run}")
    return f"{RUNS} runs, bitwise equal, {', '.join(dtypes)}"


def offsets(name: str) -> str:
    """A bag beyond element 2³¹ has the bits of the same bag in tensors of its own."""
    length = 40 if INTERPRETED else 300
    torch.manual_seed(0)
    dim, hidden, classes = (32, 16, 3) if INTERPRETED else POOL
    wide = dim if name == "pool" else CLASSES[1]
    kind = torch.bfloat16 if name == "pool" and not INTERPRETED else torch.float32
    rows = 200 if INTERPRETED else (1 << 31) // wide + 1000
    columns = wide if name == "pool" else sum(CLASSES)
    need = 3 * rows * columns * kind.itemsize
    if not INTERPRETED and torch.cuda.mem_get_info()[0] < need:
        return f"SKIPPED: needs {need / 2**30:.0f} GiB"
    weights = [
        *(_randn(*s, scale=dim**-0.5) for s in ((hidden, dim), (hidden,)) * 2),
        _randn(classes, hidden, scale=hidden**-0.5),
        _randn(classes),
    ]
    bag = [_randn(length, k) for k in ((dim,) if name == "pool" else CLASSES)]
    lse = [t.logsumexp(0)[None] for t in bag]
    parent = torch.tensor(PARENT, device=device())
    found = []
    for count in (length, rows):
        given = [torch.zeros(count, t.shape[1], device=device(), dtype=kind) for t in bag]
        for whole, part in zip(given, bag, strict=True):
            whole[-length:] = part
            whole.requires_grad_()
        spans = torch.tensor([[count - length, length]])
        if name == "pool":
            pooled, _, logits = gated_attention_pool(*given, *weights, spans)
            results = [pooled, logits[-length:]]
        else:
            results = [hierarchy_alignment(given[0], lse[0], given[1], lse[1], parent, spans)]
        grads = torch.autograd.grad(sum(r.square().sum() for r in results), given)
        found.append([*results, *(g[-length:].clone() for g in grads)])
        del given, grads
        tidy()
    for k, (a, b) in enumerate(zip(*found, strict=True)):
        if not torch.equal(a, b):
            raise AssertionError(f"result {k} differs where the bag begins at row {rows - length}")
    return f"{rows:,} rows of {wide}: bitwise equal to a bag of its own"


def tiny(name: str) -> str:
    """All kernels once on small bags: for compute-sanitizer, which is slow."""
    for op, (make, dtypes) in OPS.items():
        for dtype in dtypes if op != "pool" else ():  # the core's kernels are the same
            torch.manual_seed(0)
            ours, _, operands = make(True)
            _run(ours, operands, _precision(dtype))
    return "all kernels ran"


PROOFS: dict[str, tuple[Callable[[str], str], str]] = {
    **{f"numerics-{op}": (numerics, op) for op in OPS},
    **{f"determinism-{op}": (determinism, op) for op in OPS},
    **{f"offsets-{op}": (offsets, op) for op in ("pool", "alignment")},
    "tiny": (tiny, ""),
}


def main(arguments: list[str]) -> int:
    """Run one proof by name, or all in turns."""
    if device().type != "cuda" and not INTERPRETED:
        print("Not proved: there is no GPU here. The kernels' tests interpret them on a CPU.")
        return 0
    os.environ["HMIL_KERNELS"] = "fused"
    if arguments and arguments[0] in PROOFS:
        prove, op = PROOFS[arguments[0]]
        print(prove(op))
        return 0
    print(f"Proofs on {describe()['device']}, torch {torch.__version__}")
    failed = 0
    for name in PROOFS:
        failed += _child(name, [])
    tool = shutil.which("compute-sanitizer")
    for kind in ("memcheck", "racecheck"):
        command = [tool or "compute-sanitizer", "--tool", kind, "--error-exitcode", "9"]
        if "--sanitize" in arguments and tool:
            failed += _child("tiny", command)
        else:
            print(
                f"not run: PYTORCH_NO_CUDA_MEMORY_CACHING=1 HMIL_KERNELS=fused {' '.join(command)} "
                "python -m bench.kernels.prove tiny   (or --sanitize)"
            )
    print("All proved." if not failed else f"{failed} FAILED.")
    return min(failed, 1)


def _child(name: str, prefix: list[str]) -> int:
    """1 if it failed; a sanitizer sees its allocations one by one, not the caching allocator's."""
    label = f"{prefix[2]}-{name}" if prefix else name
    more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if prefix else {}
    command = [*prefix, sys.executable, "-m", "bench.kernels.prove", name]
    try:
        said = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | more,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(f"FAILED {label}: no end after {TIMEOUT} s")
        return 1
    good = said.returncode == 0
    lines = (said.stdout if good else said.stdout + said.stderr).strip().splitlines()
    print(f"{'ok    ' if good else 'FAILED'} {label}: {lines[-1] if lines else said.returncode}")
    if not good:
        sys.stderr.write("\n".join(lines[-25:]) + "\n")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
