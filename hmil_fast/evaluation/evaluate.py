"""Evaluate a run on its own test slides or another cohort, and write metrics.json."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.match_names import slide_like
from hmil_fast.bags.splits import Slide
from hmil_fast.config import Runtime
from hmil_fast.errors import UsageError
from hmil_fast.evaluation.operating_point import OperatingPoint, at_operating_point
from hmil_fast.evaluation.predict import predict_slides
from hmil_fast.evaluation.prior import Prior, last_evaluation, resolve_prior, under_prior
from hmil_fast.evaluation.uncertainty import (
    Groups,
    calibration,
    conformal,
    fold_groups,
    write_answers,
)
from hmil_fast.metrics import evaluate_predictions
from hmil_fast.runs.predictions import (
    Prediction,
    run_predictions,
    stack_heads,
    stack_leaves,
    write_predictions,
)
from hmil_fast.runs.run import Run, make_folder, open_run, write_json

ALPHA = 0.1


@dataclass(frozen=True)
class EvaluationOptions:
    """Settings of an evaluation; None keeps that of the run's last evaluation.

    Attributes:
        alpha: Error rate allowed for conformal predictions, in (0, 1); `ALPHA` at first.
        prior: Leaf shares where the answers are used, or their name as in `read_prior`; balanced
            at first.
        operating_point: A class and the sensitivity that its threshold reaches; none at first.
    """

    alpha: float | None = None
    prior: Prior | str | None = None
    operating_point: OperatingPoint | None = None

    def resolve(self, run: Run) -> tuple[Prior, float, OperatingPoint | None]:
        """Prior, alpha and operating point, those of the last evaluation where None.

        Raises:
            UsageError: There is no such prior.
        """
        last = last_evaluation(run)
        alpha, point = self.alpha, self.operating_point
        with suppress(KeyError, TypeError, ValueError):
            alpha = alpha or float(last["conformal"]["risk"])
        with suppress(KeyError, TypeError, ValueError):
            stored = last["operating"]
            point = point or OperatingPoint(str(stored["of"]), float(stored["asked"]))
        return resolve_prior(run, self.prior), alpha or ALPHA, point


def evaluate_run(run: Run, options: EvaluationOptions = EvaluationOptions()) -> dict[str, Any]:
    """Metrics of a trained run, pooled over its folds and per fold; writes metrics.json.

    Every slide is tested once, by the fold that neither trained on it nor chose its epoch by it.
    A baseline beside the run is evaluated the same way, under "baseline". "calibration",
    "conformal" and "operating" are there if all folds have predictions of their validation slides;
    the conformal answers go into conformal.csv. predictions.csv is written anew under the prior.

    Args:
        run: A run that is trained to its end.
        options: Alpha, prior and operating point.

    Raises:
        UsageError: The run is not trained to its end, or the tree has no such node.
    """
    prior, alpha, point = options.resolve(run)
    metrics: dict[str, Any] = {
        "model": run.config.recipe.model,
        "preset": run.config.recipe.preset,
        "prior": prior.to_dict(run.tree),
    }
    predictions = under_prior(run.tree, run_predictions(run), prior)
    groups = fold_groups(run, predictions, prior)
    metrics |= _metrics_of(run, predictions, groups, alpha, point, run.path)
    metrics["folds"] = [
        score(run, [p for p in predictions if p.fold == fold], resamples=0)
        for fold in range(len(run.folds))
    ]
    if (run.path / "baseline" / "predictions.csv").exists():
        baseline = open_run(run.path / "baseline")
        predictions = under_prior(run.tree, run_predictions(baseline), prior)
        groups = fold_groups(baseline, predictions, prior)
        metrics["baseline"] = {"model": baseline.config.recipe.model}
        metrics["baseline"] |= _metrics_of(
            baseline, predictions, groups, alpha, point, baseline.path
        )
    write_json(run.path / "metrics.json", metrics)
    return metrics


def _metrics_of(
    run: Run,
    predictions: Sequence[Prediction],
    groups: Groups,
    alpha: float,
    point: OperatingPoint | None,
    out: Path | None,
) -> dict[str, Any]:
    """Metrics of predictions; predictions.csv and conformal.csv go to `out`, if there is one."""
    if out is not None:
        write_predictions(out / "predictions.csv", run.tree, predictions)
    metrics: dict[str, Any] = {"pooled": score(run, predictions)}
    leaves = set(run.tree.leaves)
    fine = [(fitted, [p for p in tested if p.label in leaves]) for fitted, tested in groups]
    if any(tested for _, tested in fine):
        metrics["calibration"] = calibration(run, fine)
        metrics["conformal"], order, answers = conformal(run, fine, alpha)
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
    slides: Sequence[Slide],
    options: EvaluationOptions = EvaluationOptions(),
    out: Path | None = None,
    runtime: Runtime = Runtime(),
) -> dict[str, Any]:
    """Metrics of a run on another labelled cohort, predicted by the mean of its folds.

    A slide whose label is an inner node counts on the levels that it names. An operating point is
    chosen on the slides that the run tested; temperature and conformal answers are fitted on them.

    Args:
        run: A run that is trained to its end.
        cache: The features of `slides`.
        slides: The cohort; a label is a leaf or an inner node of the run's tree.
        options: Alpha, prior and operating point.
        out: A folder to write metrics.json, predictions.csv, conformal.csv and tree.json into, from
            which `write_report` makes a report; None writes nothing.
        runtime: Device and precision.

    Returns:
        As `evaluate_run`, without folds.

    Raises:
        UsageError: A slide or a patient of the cohort was used to make the run, or `out` is a run
            folder or cannot be written.
    """
    if out is not None and (out / "config.yaml").exists():
        raise UsageError(f"{out} is a run folder", "give another --out")
    _refuse_slides_of_the_run(run, slides)
    prior, alpha, point = options.resolve(run)
    by_id = {slide.slide_id: slide for slide in slides}
    predictions = [
        replace(p, patient_id=by_id[p.slide_id].patient_id, label=by_id[p.slide_id].label)
        for p in predict_slides(run, cache, prior, runtime)
    ]
    tested = under_prior(run.tree, run_predictions(run), prior)
    if out is not None:
        make_folder(out)
    metrics = {
        "model": run.config.recipe.model,
        "preset": run.config.recipe.preset,
        "run": str(run.path.resolve()),
        "prior": prior.to_dict(run.tree),
        **_metrics_of(run, predictions, [(tested, predictions)], alpha, point, out),
    }
    if out is not None:
        write_json(out / "tree.json", run.tree.to_dict())
        write_json(out / "metrics.json", metrics)
    return metrics


def _refuse_slides_of_the_run(run: Run, slides: Sequence[Slide]) -> None:
    for kind, name in (("slides", "slide_id"), ("patients", "patient_id")):
        of_run = {slide_like(getattr(slide, name)) for slide in run.slides}
        of_cohort = {getattr(slide, name) for slide in slides}
        shared = {value for value in of_cohort if slide_like(value) in of_run}
        if shared:
            raise UsageError(
                f"{len(shared)} {kind} were used to train {run.path}, {min(shared)!r} among them",
                "leave them out of --labels"
                + (", or make the ids differ if they are other people" * (kind == "patients")),
            )


def score(run: Run, predictions: Sequence[Prediction], resamples: int = 1000) -> dict[str, Any]:
    """All metrics of some predictions, with intervals from resampled patients."""
    true = np.array([run.tree.path(p.label) for p in predictions], dtype=np.int64)
    return evaluate_predictions(
        run.tree,
        true.reshape(-1, run.tree.num_levels).T,
        stack_leaves(predictions, run.tree),
        [p.patient_id for p in predictions],
        seed=run.config.seed,
        draws=resamples,
        heads=stack_heads(predictions),
    )


def read_metrics(run: Run) -> dict[str, Any]:
    """metrics.json of a run; evaluates the run where the file is missing.

    Raises:
        UsageError: The file is damaged, or the run is not trained to its end.
    """
    path = run.path / "metrics.json"
    if not path.exists():
        return evaluate_run(run)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"cannot read the metrics {path}: {error}", "delete it and run `hmil-fast evaluate`"
        ) from None
