"""From predictions to metrics.json and the table that people read."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.splits import Slide
from hmil_fast.errors import UsageError
from hmil_fast.metrics import evaluate_predictions, level_name
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
from hmil_fast.training.uncertainty import calibration, conformal, read_validation, write_answers

RISK = 0.1

COLUMNS = (  # (heading, metric)
    ("AUC", "auc"),
    ("balanced accuracy", "balanced_accuracy"),
    ("macro F1", "macro_f1"),
)


def evaluate_run(run: Run, risk: float = RISK) -> dict[str, Any]:
    """Metrics of a trained run, pooled over its folds and per fold; writes metrics.json.

    Every slide is tested once, by the fold that neither trained on it nor chose its epoch by it.
    A baseline beside the run is evaluated the same way, under "baseline". "calibration" and
    "conformal" are there if all folds have predictions of their validation slides; the answers of
    the latter go into conformal.csv.

    Args:
        run: A run that is trained to its end.
        risk: Asked share of conformal answers that miss the true leaf, in (0, 1).

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
        **_uncertainty(run, predictions, risk),
    }
    beside = run.path / "baseline"
    if (beside / "predictions.csv").exists():
        baseline = open_run(beside)
        theirs = read_predictions(beside / "predictions.csv", run.tree)
        metrics["baseline"] = {
            "model": baseline.config.model,
            "pooled": score(run, theirs),
            **_uncertainty(baseline, theirs, risk),
        }
    write_json(run.path / "metrics.json", metrics)
    return metrics


def _uncertainty(run: Run, predictions: list[Prediction], risk: float) -> dict[str, Any]:
    held_out = read_validation(run)
    if held_out is None:
        return {}
    promised, order, answers = conformal(run, predictions, held_out, risk)
    write_answers(run, order, answers)
    return {"calibration": calibration(run, predictions, held_out), "conformal": promised}


def evaluate_cohort(run: Run, cache: FeatureCache, slides: list[Slide]) -> dict[str, Any]:
    """Metrics of a run on another labelled cohort, predicted by the mean of its folds.

    Raises:
        UsageError: A slide or a patient of the cohort was used to make the run.
    """
    for kind, name in (("slides", "slide_id"), ("patients", "patient_id")):
        known_to_run = {getattr(slide, name) for slide in run.slides}
        used = known_to_run & {getattr(slide, name) for slide in slides}
        if used:
            raise UsageError(
                f"{len(used)} {kind} were used to train {run.path}, {min(used)!r} among them",
                "leave them out of --labels"
                + (", or make the ids differ if they are other people" * (kind == "patients")),
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
    models = [(metrics["model"], metrics)]
    if "baseline" in metrics:
        models.append((f"{metrics['baseline']['model']} (baseline)", metrics["baseline"]))
    rows: list[list[str]] = []

    def add(heading: str, *path: str) -> None:
        """A row, if some model has the value."""
        cells = [_dig(model, path) for _, model in models]
        if any(c is not None for c in cells):
            rows.append([heading, *map(_text, cells)])

    levels = sorted(metrics["pooled"]["levels"], key=int)
    for level in levels:
        where = ("pooled", "levels", level)
        for heading, metric in COLUMNS:
            rows.append([f"{level_name(int(level), len(levels))} {heading}"])
            rows[-1] += [_text(_dig(model, (*where, metric))) for _, model in models]
        if in_order(metrics["pooled"].get("classes", {}).get(level, ())):
            add(f"{level_name(int(level), len(levels))} quadratic kappa", *where, "qwk")
    rows.append(["hierarchical F1"])
    rows[-1] += [_text(_dig(model, ("pooled", "tree", "hierarchical_f1"))) for _, model in models]
    for level in levels[:-1]:
        add(f"{level_name(int(level), len(levels))} head ≠ sum of leaves",
            "pooled", "tree", f"head_against_sum_{level}")  # fmt: skip
    for when in ("before", "after"):
        heading = "leaf calibration error" + ", temperature set" * (when == "after")
        add(heading, "calibration", "levels", levels[-1], when, "ece")
    risk = metrics.get("conformal", {}).get("risk")
    add(f"answers right at risk {risk}", "conformal", "node", "coverage")
    add("  their mean depth", "conformal", "node", "mean_depth")
    add("  leaves in a set (LAC)", "conformal", "lac", "mean_size")
    return ["", *(name for name, _ in models)], rows


def in_order(names: Sequence[str]) -> bool:
    """Whether class names count up, as grades do; only then a quadratic kappa means something."""
    found = [re.fullmatch(r"\D*(\d+)\D*", name) for name in names]
    numbers = [int(match[1]) for match in found if match]
    return len(numbers) == len(names) > 2 and all(a < b for a, b in pairwise(numbers))


def _dig(values: Any, path: Sequence[str]) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _text(value: Any) -> str:
    """A cell with its interval, or a plain number."""
    if value is None:
        return "—"
    if not isinstance(value, dict):
        return f"{value:.3f}"
    if value["low"] is None:
        return f"{value['value']:.3f}"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


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
