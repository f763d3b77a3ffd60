"""One cell is one method on one task with one seed; cells are kept on disk and never done twice."""

import hashlib
import os
import signal
import time
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from bench.accuracy.cohorts import TASKS, Cohort
from bench.accuracy.fit import fit
from bench.accuracy.methods import Method
from bench.accuracy.sources import CACHE, ROOT
from bench.accuracy.statistics import Run

# a change in any of these may change a prediction
SOURCES = (
    "hmil_fast/models", "hmil_fast/losses", "hmil_fast/labels.py", "kernels",
    "hmil_fast/metrics/decision.py",
    "hmil_fast/bags/dropout.py", "hmil_fast/training/ema.py", "hmil_fast/training/lr_schedule.py",
    "hmil_fast/report/attention.py", "bench/accuracy/cohorts.py", "bench/accuracy/fit.py",
    "bench/accuracy/sources.py", "bench/accuracy/tiles.py",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What a worker is asked to do; `file` is where the predictions go."""

    task: str
    method: Method
    seed: int
    epochs: int
    file: Path


def make_cell(task: str, method: Method, seed: int, epochs: int, code: str) -> Cell:
    """A cell; its file's name holds a hash of all that decides its content."""
    text = f"{task} {seed} {epochs} {method.fingerprint()} {code}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Cell(
        task, method, seed, epochs, CACHE / "cells" / f"{task}-{method.name}-{seed}-{digest}.npz"
    )


def code_hash() -> str:
    """A hash of the code that the cells depend on."""
    digest = hashlib.sha256()
    for name in SOURCES:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def start_worker() -> None:
    """Set a worker process up: Ctrl-C is left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def do_cell(cell: Cell) -> None:
    """Train and keep the predictions; nothing where that was done before."""
    if read_cell(cell) is not None:
        return
    cohort = _cohort(cell.task, cell.seed)
    begun = time.process_time()
    fitted = fit(cell.method, cohort, cell.epochs, TASKS[cell.task].val_fraction, cell.seed)
    tested = np.sort(np.concatenate(cohort.tests))
    cell.file.parent.mkdir(parents=True, exist_ok=True)
    part = cell.file.with_suffix(f".{os.getpid()}.npz")
    spent = time.process_time() - begun
    np.savez(
        part,
        y=cohort.y[tested],
        p=fitted.p[tested],
        seconds=spent,
        tile_maps=list(fitted.tiles),
        tile_aucs=list(fitted.tiles.values()),
    )
    part.replace(cell.file)


def read_cell(cell: Cell) -> Run | None:
    """The predictions of a cell that is done."""
    try:
        with np.load(cell.file) as data:
            tiles = dict(zip(data["tile_maps"].tolist(), data["tile_aucs"].tolist(), strict=True))
            return Run(data["y"], data["p"], float(data["seconds"]), tiles)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


@lru_cache(maxsize=1)
def _cohort(task: str, seed: int) -> Cohort:
    return TASKS[task].draw(seed)
