"""From predictions to metrics.json and the table that people read."""

import json
from dataclasses import replace
from typing import Any

import numpy as np

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.splits import Slide
from hmil_fast.errors import UsageError
from hmil_fast.metrics import evaluate_predictions
from hmil_fast.training.predict import predict_slides
from hmil_fast.training.run_folder import (
    Prediction,
    Run,
    open_run,
    read_predictions,
    stack_heads,
    stack_probabilities,
    write_json,
)

COLUMNS = (  # (heading, metric)
    ("AUC", "auc"),
    ("balanced accuracy", "balanced_accuracy"),
    ("macro F1", "macro_f1"),
)


def evaluate_run(run: Run) -> dict[str, Any]:
    """Metrics of a trained run, pooled over its folds and per fold; writes metrics.json.

    Every slide is tested once, by the fold that neither trained on it nor chose its epoch by it.
    A baseline beside the run is evaluated the same way, under "baseline".

    Raises:
        UsageError: The run is not trained to its end.
    """
    predictions = read_predictions(run.path / "predictions.csv", run.tree)
    folds = [[p for p in predictions if p.fold == fold] for fold in range(len(run.folds))]
    metrics: dict[str, Any] = {
        "model": run.config.model,
        "preset": run.config.preset,
        "pooled": score(run, predictions),
        "folds": [score(run, fold, draws=0) for fold in folds],
    }
    beside = run.path / "baseline"
    if (beside / "predictions.csv").exists():
        baseline = open_run(beside)
        theirs = read_predictions(beside / "predictions.csv", run.tree)
        metrics["baseline"] = {"model": baseline.config.model, "pooled": score(run, theirs)}
    write_json(run.path / "metrics.json", metrics)
    return metrics


def evaluate_cohort(run: Run, cache: FeatureCache, slides: list[Slide]) -> dict[str, Any]:
    """Metrics of a run on another labelled cohort, predicted by the mean of its folds.

    Raises:
        UsageError: A slide of the cohort was used to make the run.
    """
    used = {slide.slide_id for slide in run.slides} & {slide.slide_id for slide in slides}
    if used:
        raise UsageError(
            f"{len(used)} slides were used to train {run.path}, {sorted(used)[0]!r} among them",
            "leave them out of --labels",
        )
    known = {slide.slide_id: slide for slide in slides}
    predictions = [
        replace(p, patient_id=known[p.slide_id].patient_id, label=known[p.slide_id].label)
        for p in predict_slides(run, cache)
    ]
    return {"model": run.config.model, "pooled": score(run, predictions)}


def score(run: Run, predictions: list[Prediction], draws: int = 1000) -> dict[str, Any]:
    """All metrics of some predictions; `draws` bootstrap draws over patients."""
    return evaluate_predictions(
        run.tree,
        np.array([run.tree.leaf(p.label) for p in predictions]),
        stack_probabilities(predictions),
        [p.patient_id for p in predictions],
        seed=run.config.seed,
        draws=draws,
        heads=stack_heads(predictions),
    )


def table_rows(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the result table: one row per metric and level, one column per model."""
    models = [(metrics["model"], metrics["pooled"])]
    if "baseline" in metrics:
        models.append((f"{metrics['baseline']['model']} (baseline)", metrics["baseline"]["pooled"]))
    rows = []
    levels = sorted(metrics["pooled"]["levels"], key=int)
    for level in levels:
        for heading, metric in COLUMNS:
            cells = [_cell(model["levels"][level].get(metric)) for _, model in models]
            rows.append([f"{_name(level, levels)} {heading}", *cells])
    cells = [_cell(model["tree"].get("hierarchical_f1")) for _, model in models]
    rows.append(["hierarchical F1", *cells])
    for level in levels[:-1]:
        cells = [_cell(model["tree"].get(f"head_against_sum_{level}")) for _, model in models]
        rows.append([f"{_name(level, levels)} head ≠ sum of leaves", *cells])
    return ["", *(name for name, _ in models)], rows


def _name(level: str, levels: list[str]) -> str:
    if level == levels[-1]:
        return "leaf"
    return f"level {level}" if len(levels) > 2 else "coarse"


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "—"
    if cell["low"] is None:
        return f"{cell['value']:.3f}"
    return f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"


def read_metrics(run: Run) -> dict[str, Any]:
    """What `evaluate_run` wrote last, made anew where it is missing."""
    path = run.path / "metrics.json"
    if not path.exists():
        return evaluate_run(run)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"cannot read the metrics {path}: {error}", "delete it and run `hmil-fast evaluate`"
        ) from None
