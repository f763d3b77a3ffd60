"""`hmil-fast compare`: do runs differ, on the very same slides?"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hmil_fast.errors import UsageError
from hmil_fast.metrics import Paired, holm, level_name, paired_comparison
from hmil_fast.runs.predictions import Prediction, read_predictions, stack_leaves
from hmil_fast.runs.run import Run, open_run

CHIEF = ("auc", "balanced_accuracy", "macro_f1", "hierarchical_f1", "mean_tree_distance")
_SHOWN = {"auc": "AUC", "f1": "F1", "nll": "NLL", "qwk": "quadratic kappa", "brier": "Brier score"}
Key = tuple[str, int]  # slide, and the fold where a slide is tested in several


def compare(args: argparse.Namespace) -> int:
    """Compare runs with the first one; a table, or JSON, on stdout."""
    result = compare_runs([args.run_path, *args.others], args.metric, args.draws)
    if args.json:
        print(json.dumps(result, indent=1, allow_nan=False))
        return 0
    console = Console()
    for other in result["comparisons"]:
        console.print(_table(result, other))
    print("--json has every metric, --metric asks for others", file=sys.stderr)
    for note in result["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    return 0


def compare_runs(
    paths: Sequence[Path], metrics: Sequence[str] = (), draws: int = 2000
) -> dict[str, Any]:
    """Every metric's difference between the first run and each other, tested in pairs.

    Args:
        paths: Run folders that tested the same slides.
        metrics: The metrics that the question is about, for instance balanced_accuracy; by default
            `CHIEF`. The others are reported without a corrected p value: many of them say the
            same thing twice, and each would cost the rest its significance.
        draws: Bootstrap draws, and as many permutations.

    Returns:
        ``{"runs": [{"path", "model", "preset", "seed"}], "slides": n, "patients": m, "draws": d,
        "levels": L, "comparisons": [{"first": 0, "second": i, "metrics": {"<level>/<metric>" or
        "tree/<metric>": {"first", "second", "difference", "low", "high", "p", "p_holm"}}}],
        "notes": [text]}``, the asked metrics first. p_holm is corrected for the asked metrics of
        all comparisons, and None for the others.

    Raises:
        UsageError: The runs have other trees, slides, labels or patients, or no such metric.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("a run is named twice", "name runs that differ")
    runs = [open_run(path) for path in paths]
    first = runs[0]
    for run in runs[1:]:
        if run.tree != first.tree:
            raise UsageError(
                f"{first.path} and {run.path} have other label trees", "compare runs of one tree"
            )
    answers = _on_the_same_slides(runs)
    labels = np.array([first.tree.leaf(p.label) for p in answers[0]])
    patients = [p.patient_id for p in answers[0]]
    stacked = [stack_leaves(predictions, first.tree) for predictions in answers]
    asked = metrics or CHIEF
    tests: list[dict[str, Paired]] = []
    for other in stacked[1:]:
        found = paired_comparison(
            first.tree, labels, (stacked[0], other), patients, first.config.seed, draws
        )
        tests.append(found)
        unknown = set(metrics) - {_short(name) for name in found}
        if unknown:
            raise UsageError(
                f"the runs have no metric {', '.join(sorted(unknown))}",
                f"choose among {', '.join(sorted({_short(name) for name in found}))}",
            )
    corrected = holm(
        {
            f"{i} {name}": test.p
            for i, found in enumerate(tests)
            for name, test in found.items()
            if test.p is not None and _short(name) in asked
        }
    )
    return {
        "runs": [
            {
                "path": str(run.path),
                "model": run.config.model,
                "preset": run.config.preset,
                "seed": run.config.seed,
            }
            for run in runs
        ],
        "slides": len(labels),
        "patients": len(set(patients)),
        "draws": draws,
        "levels": first.tree.num_levels,
        "comparisons": [
            {
                "first": 0,
                "second": i + 1,
                "metrics": {
                    name: test._asdict() | {"p_holm": corrected.get(f"{i} {name}")}
                    for name, test in sorted(found.items(), key=lambda t: _short(t[0]) not in asked)
                },
            }
            for i, found in enumerate(tests)
        ],
        "notes": _notes(runs, patients),
    }


def _on_the_same_slides(runs: Sequence[Run]) -> list[list[Prediction]]:
    """The predictions of every run in one order.

    Raises:
        UsageError: Slides, labels or patients differ; names them.
    """
    everything = [read_predictions(run.path / "predictions.csv", run.tree) for run in runs]
    often = any(max(Counter(p.slide_id for p in run).values()) > 1 for run in everything if run)
    keyed: list[dict[Key, Prediction]] = [
        {(p.slide_id, p.fold if often else 0): p for p in run} for run in everything
    ]
    for run, found in zip(runs[1:], keyed[1:], strict=True):
        for a, b, one, two in (
            (runs[0], run, keyed[0], found),
            (run, runs[0], found, keyed[0]),
        ):
            only = sorted(one.keys() - two.keys())
            if only:
                raise UsageError(
                    f"{len(only)} slides were tested by {a.path} and not by {b.path}: "
                    f"{_some([slide_id for slide_id, _ in only])}",
                    "compare runs of one cohort, trained with one --splits file",
                )
        for what in ("label", "patient_id"):
            unlike = [k for k, p in keyed[0].items() if getattr(p, what) != getattr(found[k], what)]
            if unlike:
                raise UsageError(
                    f"{len(unlike)} slides have another {what} in {runs[0].path} than in "
                    f"{run.path}: {_some([slide_id for slide_id, _ in unlike])}",
                    "train both with one label file",
                )
    order = sorted(keyed[0])
    return [[found[key] for key in order] for found in keyed]


def _notes(runs: Sequence[Run], patients: Sequence[str]) -> list[str]:
    notes = []
    if any(run.folds != runs[0].folds for run in runs):
        notes.append(
            "the runs were trained on other folds, so part of a difference is that of the splits"
        )
    if any(run.store != runs[0].store for run in runs):
        notes.append("the runs were trained on other features")
    if len(set(patients)) < 2:
        notes.append("all slides are of one patient: nothing can be tested")
    notes.append(
        "intervals and p values show what other patients would change, not another training run"
    )
    return notes


def _table(result: dict[str, Any], comparison: dict[str, Any]) -> Table:
    a, b = (result["runs"][comparison[side]] for side in ("first", "second"))
    names = [f"{escape(run['path'])} ({run['model']}, {run['preset']})" for run in (a, b)]
    title = (
        f"A: {names[0]}\nB: {names[1]}\n{result['slides']} slides of {result['patients']} "
        "patients, paired by patient; Holm over the metrics asked for, * < 0.05"
    )
    # without spaces beside the lines, names and numbers fit 80 columns
    table = Table(padding=0, title=title, title_justify="left")
    table.add_column("")
    for heading in ("A", "B", "B − A [95 %]", "p", "p (Holm)"):
        table.add_column(heading, justify="right", no_wrap=True)
    asked = {k: test for k, test in comparison["metrics"].items() if test["p_holm"] is not None}
    for name, test in (asked or comparison["metrics"]).items():  # one patient: nothing is tested
        where, metric = name.split("/")
        heading = "" if where == "tree" else level_name(int(where), result["levels"]) + " "
        change = f"{test['difference']:+.3f}"
        if test["low"] is not None:
            change += f" [{test['low']:+.3f}, {test['high']:+.3f}]"
        p = ["—" if test[k] is None else f"{test[k]:.4f}" for k in ("p", "p_holm")]
        if test["p_holm"] is not None and test["p_holm"] < 0.05:
            p[1] += " *"
        values = (f"{test[side]:.3f}" for side in ("first", "second"))
        words = [_SHOWN.get(word, word) for word in metric.split("_")]
        table.add_row(heading + " ".join(words), *values, change, *p)
    return table


def _short(name: str) -> str:
    return name.split("/")[1]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
