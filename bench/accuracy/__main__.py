"""`make evaluate`: how well HMIL and its rivals do on real data.

    python -m bench.accuracy [--tasks fashion,pcam] [--methods best,abmil] [--seeds 5] [--workers 2]

Every finished cell (task, method, seed) is kept below build/evaluate, so that a stopped run goes
on where it was. The run over everything writes bench/results/accuracy.json and docs/accuracy.md.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.accuracy.cells import Cell, code_hash, do_cell, make_cell, read_cell, start_worker
from bench.accuracy.cohorts import TASKS
from bench.accuracy.decisions import measure
from bench.accuracy.methods import STRENGTHS, TREES_ONLY, methods
from bench.accuracy.sources import ROOT, MissingError
from bench.accuracy.statistics import resample
from bench.accuracy.tables import markdown, page, summarise

DRAWS = 2000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("--tasks", default=",".join(TASKS), help="default: all")
    parser.add_argument("--methods", default="", help="default: all")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, …")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=0, help="default: each task's own")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the page")
    args = parser.parse_args(arguments)

    console = Console(stderr=True)
    names = [name for name in args.tasks.split(",") if name]
    chosen = [m.name for m in methods() if not args.methods or m.name in args.methods.split(",")]
    unknown = [n for n in names if n not in TASKS]
    unknown += [n for n in args.methods.split(",") if n and n not in {m.name for m in methods()}]
    if unknown or not chosen or args.seeds < 1:
        parser.error(f"unknown: {', '.join(unknown)}; tasks: {', '.join(TASKS)}; methods: "
                     f"{', '.join(m.name for m in methods())}")  # fmt: skip

    skipped = _missing(names, console)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    code = code_hash()
    cells = [
        make_cell(name, method, seed, args.epochs or TASKS[name].epochs, code)
        for name in names
        if name not in skipped
        for seed in seeds
        for method in methods(name)
        if method.name in chosen and (method.name not in TREES_ONLY or TASKS[name].redrawn)
    ]
    if not cells:
        console.print("no data set is at hand", style="red")
        return 1
    if not do_all(cells, args.workers, console):
        return 130
    results = _results(cells, skipped)
    print(markdown(results))
    everything = len(names) == len(TASKS) and not args.methods and not skipped
    out = args.out or (None if not everything else ROOT)
    if out is not None:
        for folder in ("bench/results", "docs"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1) + "\n"
        (out / "bench/results/accuracy.json").write_text(text, encoding="utf-8")
        (out / "docs/accuracy.md").write_text(page(results), encoding="utf-8")
        console.print(f"wrote {out}/docs/accuracy.md and {out}/bench/results/accuracy.json")
    return 0


def _missing(names: Sequence[str], console: Console) -> dict[str, str]:
    """Tasks whose data are not here, and why; draws a cohort of each, which encodes PCam once."""
    missing = {}
    for name in names:
        with console.status(f"reading {TASKS[name].title}"):
            try:
                TASKS[name].draw(0)
            except MissingError as error:
                missing[name] = str(error)
                console.print(f"skipped {name}: {error}", style="yellow", highlight=False)
    return missing


def do_all(cells: Sequence[Cell], workers: int, console: Console) -> bool:
    """Do what is not done yet; False when the user stopped it."""
    todo = [cell for cell in cells if read_cell(cell) is None]
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console,
    )  # fmt: skip
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, who import torch themselves
    with (
        bar,
        ProcessPoolExecutor(
            max(1, min(workers, len(todo))),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=start_worker,
        ) as pool,
    ):
        line = bar.add_task("cells", total=len(cells), completed=len(cells) - len(todo))
        futures = {pool.submit(do_cell, cell): cell for cell in todo}
        try:
            for future in as_completed(futures):
                future.result()
                cell = futures[future]
                bar.update(line, advance=1, description=f"{cell.task} {cell.method.name}")
        except KeyboardInterrupt:
            console.print("stopping after the running cells; the same command goes on from here")
            # waiting: the end of `with` takes back a cancellation that was not seen yet
            pool.shutdown(cancel_futures=True)
            return False
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return True


def _results(cells: Sequence[Cell], skipped: dict[str, str]) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for name in dict.fromkeys(cell.task for cell in cells):
        runs: dict[str, list[Any]] = {}
        for cell in cells:
            if cell.task == name:
                runs.setdefault(cell.method.name, []).append(read_cell(cell))
        cohort = TASKS[name].draw(cells[0].seed)
        found = resample(cohort.tree, runs, TASKS[name].redrawn, DRAWS)
        tasks[name] = summarise(found)
        if cohort.tree.num_levels > 1:
            tasks[name]["decisions"] = {
                method: measure(cohort.tree, runs[method])
                for method in ("best", "abmil")
                if method in runs
            }
        for method, per_seed in runs.items():
            spent = sum(run.seconds for run in per_seed)
            tasks[name]["methods"][method]["cpu_seconds"] = round(spent, 1)
            tasks[name]["methods"][method]["tile_auc"] = {
                title: [round(run.tiles[title], 4) for run in per_seed]
                for title in per_seed[0].tiles
            }
        tasks[name]["cpu_seconds"] = sum(m["cpu_seconds"] for m in tasks[name]["methods"].values())
        lengths = cohort.bags[:, 1]
        tested = sum(len(test) for test in cohort.tests)
        tasks[name]["epochs"] = next(cell.epochs for cell in cells if cell.task == name)
        tasks[name]["seeds"] = len({cell.seed for cell in cells})
        sizes = f"{lengths.min()}–{lengths.max()} instances (median {int(np.median(lengths))})"
        if lengths.min() == lengths.max():
            sizes = f"{lengths[0]} instances"
        folds = f" in {len(cohort.tests)} folds" if len(cohort.tests) > 1 else ""
        tasks[name]["about"] = (
            f"{len(lengths)} bags of {sizes} of {cohort.x.shape[1]} features, {tested} of them "
            f"tested{folds};"
        )
    settings: dict[str, dict[str, Any]] = {name: {} for name in tasks}
    for cell in cells:
        strength = asdict(STRENGTHS[cell.method.strength])
        settings[cell.task][cell.method.name] = asdict(cell.method) | strength
    return {
        "tasks": tasks,
        "skipped": skipped,
        "settings": settings,
        "draws": DRAWS,
        "cpu_minutes": sum(task["cpu_seconds"] for task in tasks.values()) / 60,
    }


if __name__ == "__main__":
    sys.exit(main())
