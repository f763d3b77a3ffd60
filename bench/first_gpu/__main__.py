"""Settle in minutes what only a GPU can: proofs, rates, and the constants that they decide.

Every step is a process of its own with a time limit, so that a crash or a hang costs one step.
Group A is about correctness and makes the inputs, several at once; group B is timed, each alone.
The results go to OUT/<device>/first-gpu.json and first-gpu.md, ready to be committed.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from bench.first_gpu import decoding, inputs, jobs, journal, report, training

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 560  # s
DRY_TIMES = 6  # as long a dry run may take
PY = sys.executable


class Step(NamedTuple):
    """What is run, and how many seconds it may take."""

    name: str
    command: Sequence[str]
    limit: int
    env: dict[str, str]


# names that `--step` takes
STEPS: dict[str, Callable[[], None]] = {
    "slide": inputs.slide,
    "slide-jpeg2000": inputs.slide_jpeg2000,
    "weights": inputs.weights,
    "bags": inputs.bags,
    "pixels": decoding.pixels,
    "rates": decoding.rates,
    "order": decoding.order,
    "transform": decoding.transform,
    "step": training.step,
    "supcon": training.supcon,
    "encoder": jobs.encoder,
    "extract-jpeg-cpu": partial(jobs.extract, "jpeg", "cpu"),
    "extract-jpeg-gpu": partial(jobs.extract, "jpeg", "gpu"),
    "extract-jpeg2000-cpu": partial(jobs.extract, "jpeg2000", "cpu"),
    "extract-jpeg2000-gpu": partial(jobs.extract, "jpeg2000", "gpu"),
    "train": jobs.train,
}


def own(name: str, limit: int) -> Step:
    """A step of this script; a dry run may be on a machine that does other things too."""
    limit *= DRY_TIMES if journal.dry() else 1
    return Step(name, [PY, "-m", "bench.first_gpu", "--step", name], limit, {})


def _proofs() -> list[Step]:
    proof = "bench.kernels.prove"
    fused = {"HMIL_KERNELS": "fused"}
    named = [f"numerics-{op}" for op in ("pool", "core", "alignment", "supcon")]
    named += [f"determinism-{op}" for op in ("core", "pool", "alignment", "supcon")]
    named += ["offsets-pool", "offsets-alignment"]
    steps = [Step(name, [PY, "-m", proof, name], 110, fused) for name in named]
    slow = {**fused, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        steps.append(Step(f"sanitizer-{tool}", [*command, PY, "-m", proof, "tiny"], 110, slow))
    return steps


def group_a() -> list[list[Step]]:
    """Inputs and proofs: lists whose steps run at once."""
    made = [own(name, 100) for name in ("slide", "slide-jpeg2000", "weights", "bags")]
    if journal.dry():
        return [made]
    tests = [PY, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests"]
    doctor = [PY, "-m", "hmil_fast.cli", "doctor"]
    proofs = _proofs()
    return [
        [*made, Step("doctor", doctor, 110, {}), *proofs[:4]],
        [*proofs[4:], Step("tests", tests, 120, {})],
    ]


def group_b() -> list[Step]:
    """The steps that are timed, the most important first."""
    table = [PY, "-m", "bench.kernels", "--budget", "100", "--json",
             str(journal.folder() / "kernels.json")]  # fmt: skip
    steps = [
        ("step", 45), ("pixels", 30), ("rates", 50), ("order", 20), ("encoder", 40),
        ("extract-jpeg-cpu", 70), ("extract-jpeg-gpu", 70), ("extract-jpeg2000-gpu", 50),
        ("extract-jpeg2000-cpu", 60), ("train", 60), ("supcon", 25), ("transform", 40),
    ]  # fmt: skip
    if journal.dry():  # the two that say no more than that they need a GPU are left out
        return [own(name, limit) for name, limit in steps if not name.endswith("-gpu")]
    return [Step("kernels", table, 150, {}), *(own(name, limit) for name, limit in steps)]


def main() -> int:
    """Run all steps, or one."""
    parser = argparse.ArgumentParser(prog="python -m bench.first_gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="S",
                        help=f"begin no step that may end later (default: {BUDGET})")  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, to try the script")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        STEPS[args.step]()
        return 0
    if args.dry:
        os.environ[journal.DRY] = "1"
    inputs.cuda_is_there()
    with tempfile.TemporaryDirectory(prefix="first-gpu-") as work:
        os.environ[journal.FOLDER] = work
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
        )
        began = time.time()
        left = began + args.budget * (DRY_TIMES if args.dry else 1)
        for together in group_a():
            _run(together, left)
        for step in group_b():
            _run([step], left)
        name = "a CPU (dry run)" if args.dry else torch.cuda.get_device_name()
        place = args.out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        report.write(place, name, time.time() - began)
    print((place / "first-gpu.md").read_text())
    return 0


def _run(steps: Sequence[Step], left: float) -> None:
    """Run steps at once; those that may not end in time are noted as left out."""
    running = []
    for step in steps:
        if time.time() + step.limit / 2 > left:
            journal.say("left out", name=step.name, because="the budget is spent")
            continue
        log = (journal.folder() / f"{step.name}.log").open("w")
        try:
            process = subprocess.Popen(
                step.command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | step.env,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            journal.say("left out", name=step.name, because=str(error))
            continue
        running.append((step, process, time.time()))
    for step, process, since in running:
        try:
            code: int | str = process.wait(max(1.0, min(since + step.limit, left) - time.time()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the workers that it has
            process.wait()
            code = "no end in time"
        lines = (journal.folder() / f"{step.name}.log").read_text(errors="replace").splitlines()
        tail = lines[-1:] if code == 0 else lines[-25:]
        journal.say("ended", name=step.name, code=code, seconds=round(time.time() - since, 1),
                    tail=tail)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
