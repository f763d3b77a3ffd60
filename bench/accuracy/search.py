"""Learning rate and regularisation of every method, on cohorts that are not reported.

    python -m bench.accuracy.search [--tasks fashion,pcam] [--workers 2]

Prints, per task and method, the pairs of the grid from the best down, by the sum of leaf balanced
accuracy and hierarchical F1 on the tested bags, mean over the cohorts of seeds 100 to 102. The
first of each is what `methods.TUNED` says.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.console import Console

from bench.accuracy.__main__ import do_all
from bench.accuracy.cells import code_hash, make_cell, read_cell
from bench.accuracy.cohorts import TASKS
from bench.accuracy.methods import TUNED, Method, methods
from bench.accuracy.statistics import Run, resample
from hmil_fast.labels import LabelTree

SEEDS = (100, 101, 102)
RATES, SEARCHED = (6e-3, 1.2e-2, 2.4e-2, 4.8e-2), ("light", "middle", "heavy")
CONSTANT_RATES = (7e-4, 2e-3, 6e-3, 1.2e-2)


def grid(task: str) -> list[Method]:
    """Every method that learns, at every pair of its grid; presets as published have their own."""
    return [
        replace(method, lr=lr, strength=strength)
        for method in methods(task)
        if method.name in TUNED[task] or method.published
        for lr in (CONSTANT_RATES if method.published else RATES)
        for strength in ((method.strength,) if method.published else SEARCHED)
    ]


def scores(tree: LabelTree, run: Run) -> tuple[float, float]:
    """Leaf balanced accuracy and hierarchical F1."""
    found = resample(tree, {"": [run]}, True, 1)[""]
    return float(found["balanced_accuracy"][0]), float(found["hierarchical_f1"][0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=",".join(TUNED))
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(arguments)
    code = code_hash()
    for task in args.tasks.split(","):
        cells = {
            (method.name, method.lr, method.strength, seed): make_cell(
                task, method, seed, TASKS[task].epochs, code
            )
            for seed in SEEDS
            for method in grid(task)
        }
        if not do_all(list(cells.values()), args.workers, Console(stderr=True)):
            return 130
        tree = TASKS[task].draw(SEEDS[0]).tree
        table: dict[str, list[tuple[float, str]]] = {}
        for name, lr, strength in dict.fromkeys(key[:3] for key in cells):
            runs = [read_cell(cells[name, lr, strength, seed]) for seed in SEEDS]
            each = np.array([scores(tree, run) for run in runs if run is not None])
            by_seed = " ".join(f"{a:.3f}/{f:.3f}" for a, f in each)
            a, f = each.mean(0)
            row = f"{task} {name:9} lr {lr:g} {strength:6}: {a:.3f} {f:.3f}  ({by_seed})"
            table.setdefault(name, []).append((a + f, row))
        for rows in table.values():
            print("\n".join(row for _, row in sorted(rows, reverse=True)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
