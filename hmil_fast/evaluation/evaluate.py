"""From predictions to metrics.json and the table that people read."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.match_names import slide_like
from hmil_fast.bags.splits import Slide
from hmil_fast.errors import UsageError
from hmil_fast.evaluation.operating_point import OperatingPoint, at_operating_point
from hmil_fast.evaluation.predict import predict_slides
from hmil_fast.evaluation.prior import Prior, current_prior, last_evaluation, under_prior
from hmil_fast.evaluation.uncertainty import (
    Groups,
    calibration,
    conformal,
    fold_groups,
    write_answers,
)
from hmil_fast.metrics import evaluate_predictions, level_name, rates
from hmil_fast.runs.predictions import (
    Prediction,
    run_predictions,
    stack_heads,
    stack_leaves,
    write_predictions,
)
from hmil_fast.runs.run import Run, make_folder, open_run, write_json

RISK = 0.1

COLUMNS = (  # (heading, metric)
    ("AUC", "auc"),
    ("balanced accuracy", "balanced_accuracy"),
    ("macro F1", "macro_f1"),
)


@dataclass(frozen=True)
class Asked:
    """What an evaluation is asked for; None is as in the run's last evaluation.

    Attributes:
        risk: Accepted share of conformal answers that miss the true leaf, in (0, 1); 0.1 at first.
        prior: How frequent the leaves are; balanced at first.
        operating: A sensitivity to reach; none at first.
    """

    risk: float | None = None
    prior: Prior | None = None
    operating: OperatingPoint | None = None

    def filled(self, run: Run) -> tuple[Prior, tuple[float, OperatingPoint | None]]:
        """Prior, and risk and operating point, those of the last evaluation where None."""
        last = last_evaluation(run)
        risk, point = self.risk, self.operating
        with suppress(KeyError, TypeError, ValueError):
            risk = risk or float(last["conformal"]["risk"])
        with suppress(KeyError, TypeError, ValueError):
            there = last["operating"]
            point = point or OperatingPoint(str(there["of"]), float(there["asked"]))
        return self.prior or current_prior(run), (risk or RISK, point)


def evaluate_run(run: Run, asked: Asked | None = None) -> dict[str, Any]:
    """Metrics of a trained run, pooled over its folds and per fold; writes metrics.json.

    Every slide is tested once, by the fold that neither trained on it nor chose its epoch by it.
    A baseline beside the run is evaluated the same way, under "baseline". "calibration",
    "conformal" and "operating" are there if all folds have predictions of their validation slides;
    the conformal answers go into conformal.csv. predictions.csv is written anew under the prior.

    Args:
        run: A run that is trained to its end.
        asked: Risk, prior and operating point.

    Raises:
        UsageError: The run is not trained to its end, or the tree has no such node.
    """
    prior, told = (asked or Asked()).filled(run)
    metrics: dict[str, Any] = {
        "model": run.config.model,
        "preset": run.config.preset,
        "prior": prior.described(run.tree),
    }
    predictions = under_prior(run.tree, run_predictions(run), prior)
    metrics |= _measured(run, predictions, fold_groups(run, predictions, prior), told, run.path)
    metrics["folds"] = [
        score(run, [p for p in predictions if p.fold == fold], draws=0)
        for fold in range(len(run.folds))
    ]
    if (run.path / "baseline" / "predictions.csv").exists():
        baseline = open_run(run.path / "baseline")
        theirs = under_prior(run.tree, run_predictions(baseline), prior)
        groups = fold_groups(baseline, theirs, prior)
        metrics["baseline"] = {"model": baseline.config.model}
        metrics["baseline"] |= _measured(baseline, theirs, groups, told, baseline.path)
    write_json(run.path / "metrics.json", metrics)
    return metrics


def _measured(
    run: Run,
    predictions: Sequence[Prediction],
    groups: Groups,
    told: tuple[float, OperatingPoint | None],
    out: Path | None,
) -> dict[str, Any]:
    """Metrics of predictions under `told`, a risk and an operating point.

    predictions.csv and conformal.csv go to `out`, if there is one.
    """
    risk, point = told
    if out is not None:
        write_predictions(out / "predictions.csv", run.tree, predictions)
    metrics: dict[str, Any] = {"pooled": score(run, predictions)}
    leaves = set(run.tree.leaves)
    fine = [(chosen, [p for p in tested if p.label in leaves]) for chosen, tested in groups]
    if any(tested for _, tested in fine):
        metrics["calibration"] = calibration(run, fine)
        metrics["conformal"], order, answers = conformal(run, fine, risk)
        if out is not None:
            write_answers(out / "conformal.csv", run, order, answers)
    elif out is not None:  # of an earlier evaluation
        (out / "conformal.csv").unlink(missing_ok=True)
    if point is not None and groups:
        metrics["operating"] = at_operating_point(run, point, groups)
    return metrics


def evaluate_cohort(
    run: Run,
    cache: FeatureCache,
    slides: list[Slide],
    asked: Asked | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Metrics of a run on another labelled cohort, predicted by the mean of its folds.

    A slide whose label is an inner node counts on the levels that it names. An operating point is
    chosen on the slides that the run tested; temperature and conformal answers are fitted on them.

    Args:
        run: A run that is trained to its end.
        cache: The features of `slides`.
        slides: The cohort; a label is a leaf or an inner node of the run's tree.
        asked: Risk, prior and operating point.
        out: A folder to write metrics.json, predictions.csv, conformal.csv and tree.json into, from
            which `write_report` makes a report; None writes nothing.

    Returns:
        As `evaluate_run`, without folds.

    Raises:
        UsageError: A slide or a patient of the cohort was used to make the run, or `out` is a run
            folder or cannot be written.
    """
    if out is not None and (out / "config.yaml").exists():
        raise UsageError(f"{out} is a run folder", "give another --out")
    for kind, name in (("slides", "slide_id"), ("patients", "patient_id")):
        known_to_run = {slide_like(getattr(slide, name)) for slide in run.slides}
        here = {getattr(slide, name) for slide in slides}
        used = {value for value in here if slide_like(value) in known_to_run}
        if used:
            raise UsageError(
                f"{len(used)} {kind} were used to train {run.path}, {min(used)!r} among them",
                "leave them out of --labels"
                + (", or make the ids differ if they are other people" * (kind == "patients")),
            )
    prior, told = (asked or Asked()).filled(run)
    known = {slide.slide_id: slide for slide in slides}
    predictions = [
        replace(p, patient_id=known[p.slide_id].patient_id, label=known[p.slide_id].label)
        for p in predict_slides(run, cache, prior)
    ]
    tested = under_prior(run.tree, run_predictions(run), prior)
    if out is not None:
        make_folder(out)
    metrics = {
        "model": run.config.model,
        "preset": run.config.preset,
        "run": str(run.path.resolve()),
        "prior": prior.described(run.tree),
        **_measured(run, predictions, [(tested, predictions)], told, out),
    }
    if out is not None:
        write_json(out / "tree.json", run.tree.to_dict())
        write_json(out / "metrics.json", metrics)
    return metrics


def score(run: Run, predictions: Sequence[Prediction], draws: int = 1000) -> dict[str, Any]:
    """All metrics of some predictions; `draws` bootstrap draws over patients."""
    true = np.array([run.tree.path(p.label) for p in predictions], dtype=np.int64)
    return evaluate_predictions(
        run.tree,
        true.reshape(-1, run.tree.num_levels).T,
        stack_leaves(predictions, run.tree),
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
        for heading, *path in rates(metrics["pooled"], level):
            add(f"{level_name(int(level), len(levels))} {heading}", "pooled", *path)
        if in_order(metrics["pooled"].get("classes", {}).get(level, ())):
            add(f"{level_name(int(level), len(levels))} quadratic kappa", *where, "qwk")
    rows.append(["hierarchical F1"])
    rows[-1] += [_text(_dig(model, ("pooled", "tree", "hierarchical_f1"))) for _, model in models]
    point = metrics.get("operating")
    if point:
        for name in ("sensitivity", "specificity"):
            aim = f"{point['of']} {name}, threshold for {point['asked']:g}"
            add(aim, "operating", name)
    for level in levels:
        for when in ("before", "after"):
            heading = f"{level_name(int(level), len(levels))} calibration error"
            heading += ", temperature set" * (when == "after")
            add(heading, "calibration", "levels", level, when, "ece")
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
