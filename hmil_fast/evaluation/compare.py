"""Paired tests between runs that tested the same slides."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from hmil_fast.errors import UsageError, some
from hmil_fast.metrics import Paired, holm, paired_comparison
from hmil_fast.runs.predictions import Prediction, read_predictions, stack_leaves
from hmil_fast.runs.run import Run

TESTED = ("auc", "balanced_accuracy", "macro_f1", "hierarchical_f1", "mean_tree_distance")
Key = tuple[str, int]  # slide, and the fold where a slide is tested in several


def compare_runs(
    runs: Sequence[Run], metrics: Sequence[str] = (), resamples: int = 2000
) -> dict[str, Any]:
    """Every metric's difference between the first run and each other, tested in pairs.

    Args:
        runs: Runs that tested the same slides.
        metrics: The metrics to test, for instance balanced_accuracy; by default `TESTED`. The
            others are reported without a corrected p value: many of them measure the same thing,
            and each would cost the rest its significance.
        resamples: Bootstrap draws, and as many permutations.

    Returns:
        ``{"runs": [{"path", "model", "preset", "seed"}], "slides": n, "patients": m, "draws": d,
        "levels": L, "comparisons": [{"first": 0, "second": i, "metrics": {"<level>/<metric>" or
        "tree/<metric>": {"first", "second", "difference", "low", "high", "p", "p_holm"}}}],
        "notes": [text]}``, the tested metrics first. p_holm is corrected for the tested metrics of
        all comparisons, and None for the others.

    Raises:
        UsageError: The runs have other trees, slides, labels or patients, or no such metric.
    """
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise UsageError("a run is named twice", "name runs that differ")
    first = runs[0]
    for run in runs[1:]:
        if run.tree != first.tree:
            raise UsageError(
                f"{first.path} and {run.path} have other label trees", "compare runs of one tree"
            )
    predictions = _on_the_same_slides(runs)
    labels = np.array([first.tree.leaf(p.label) for p in predictions[0]])
    patients = [p.patient_id for p in predictions[0]]
    p_leaf = [stack_leaves(of_run, first.tree) for of_run in predictions]
    family = metrics or TESTED
    comparisons: list[dict[str, Paired]] = []
    for other in p_leaf[1:]:
        tests = paired_comparison(
            first.tree, labels, (p_leaf[0], other), patients, first.config.seed, resamples
        )
        comparisons.append(tests)
        unknown = set(metrics) - {_short(name) for name in tests}
        if unknown:
            raise UsageError(
                f"the runs have no metric {', '.join(sorted(unknown))}",
                f"choose among {', '.join(sorted({_short(name) for name in tests}))}",
            )
    corrected = holm(
        {
            f"{i} {name}": test.p
            for i, tests in enumerate(comparisons)
            for name, test in tests.items()
            if test.p is not None and _short(name) in family
        }
    )
    return {
        "runs": [
            {
                "path": str(run.path),
                "model": run.config.recipe.model,
                "preset": run.config.recipe.preset,
                "seed": run.config.seed,
            }
            for run in runs
        ],
        "slides": len(labels),
        "patients": len(set(patients)),
        "draws": resamples,
        "levels": first.tree.num_levels,
        "comparisons": [
            {
                "first": 0,
                "second": i + 1,
                "metrics": {
                    name: test._asdict() | {"p_holm": corrected.get(f"{i} {name}")}
                    for name, test in sorted(
                        tests.items(), key=lambda t: _short(t[0]) not in family
                    )
                },
            }
            for i, tests in enumerate(comparisons)
        ],
        "notes": _notes(runs, patients),
    }


def _on_the_same_slides(runs: Sequence[Run]) -> list[list[Prediction]]:
    """The predictions of every run in one order.

    Raises:
        UsageError: Slides, labels or patients differ; names them.
    """
    predictions = [read_predictions(run.path / "predictions.csv", run.tree) for run in runs]
    repeated = any(max(Counter(p.slide_id for p in run).values()) > 1 for run in predictions if run)
    keyed: list[dict[Key, Prediction]] = [
        {(p.slide_id, p.fold if repeated else 0): p for p in run} for run in predictions
    ]
    first = runs[0]
    for run, other in zip(runs[1:], keyed[1:], strict=True):
        for a, b, only in (
            (first, run, keyed[0].keys() - other.keys()),
            (run, first, other.keys() - keyed[0].keys()),
        ):
            if only:
                raise UsageError(
                    f"{len(only)} slides were tested by {a.path} and not by {b.path}: "
                    f"{some([slide_id for slide_id, _ in sorted(only)])}",
                    "compare runs of one cohort, trained with one --splits file",
                )
        for field in ("label", "patient_id"):
            unlike = [
                slide_id
                for (slide_id, fold), p in keyed[0].items()
                if getattr(p, field) != getattr(other[slide_id, fold], field)
            ]
            if unlike:
                raise UsageError(
                    f"{len(unlike)} slides have another {field} in {first.path} than in "
                    f"{run.path}: {some(unlike)}",
                    "train both with one label file",
                )
    order = sorted(keyed[0])
    return [[of_run[key] for key in order] for of_run in keyed]


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


def _short(name: str) -> str:
    return name.split("/")[1]
