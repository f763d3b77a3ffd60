"""Measure a run, on its own test slides or on another cohort; compare runs; export a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hmil_fast.api.opening import as_run, as_store, run_features
from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.labelled import name_empty, with_features
from hmil_fast.bags.splits import Slide, read_labels
from hmil_fast.config import Runtime
from hmil_fast.errors import UsageError
from hmil_fast.evaluation.compare import compare_runs
from hmil_fast.evaluation.evaluate import EvaluationOptions, evaluate_cohort, evaluate_run
from hmil_fast.evaluation.export import export_run
from hmil_fast.evaluation.model_card import write_card
from hmil_fast.evaluation.predict import write_validation
from hmil_fast.io.store import FeatureStore
from hmil_fast.io.store.location import Location
from hmil_fast.report.html.page import write_report
from hmil_fast.runs.run import Run
from hmil_fast.tables import Say, quiet


def evaluate(
    run: Run | Path | str,
    store: FeatureStore | Location | str | None = None,
    labels: Sequence[Slide] | Path | str | None = None,
    *,
    out: Path | str | None = None,
    options: EvaluationOptions = EvaluationOptions(),
    runtime: Runtime = Runtime(),
    say: Say = quiet,
) -> dict[str, Any]:
    """Metrics of a run on its own test slides, or on another cohort if `labels` are given.

    The run's own metrics are written into its folder.

    Args:
        run: A trained run, or its folder.
        store: Features of the other cohort; or of the run's own slides, from which missing
            predictions of validation slides are made.
        labels: The other cohort: what `read_labels` returns, or a CSV file for it.
        out: Folder for metrics.json, predictions.csv, conformal.csv, tree.json and report.html of
            the other cohort.
        options: Alpha, prior and operating point; by default those of the last evaluation.
        runtime: Device and precision.
        say: Called with each note.

    Returns:
        metrics.json, see `hmil_fast.metrics.evaluate_predictions` for its "pooled".

    Raises:
        UsageError: The run is not trained to its end, the cohort shares slides or patients with
            it, an argument contradicts another, or a file cannot be read or written.
        StoreError: No such store or slide, or a damaged one.

    Example:
        >>> import hmil_fast
        >>> metrics = hmil_fast.evaluate("run")
        >>> sorted(metrics["pooled"]["levels"])  # coarse first
        ['0', '1']
    """
    run = as_run(run)
    if labels is None and out is not None:
        raise UsageError(
            f"the metrics of the run's own slides go into {run.path}",
            "leave out --out, or give --labels",
        )
    if labels is not None and store is None:
        raise UsageError("another cohort needs --store and --labels", "give both, or neither")
    if store is not None:
        store = as_store(run, store, say)
    if labels is None or store is None:
        if store is not None:
            write_validation(run, run_features(store, run, say, runtime), runtime)
        metrics = evaluate_run(run, options)
        write_card(run)
        if (run.path / "report.html").exists():
            say(
                f"{run.path / 'report.html'} shows an earlier evaluation: `hmil-fast report` makes "
                "a new one"
            )
        return metrics
    if isinstance(labels, Path | str):
        labels = read_labels(Path(labels), run.tree, inner=True, say=say)
    slides = with_features(store, labels, say)
    cache = FeatureCache(store, [slide.slide_id for slide in slides], run.path)
    name_empty(cache, say)
    folder = None if out is None else Path(out)
    metrics = evaluate_cohort(run, cache, slides, options, folder, runtime)
    if folder is not None:
        write_report(folder)
    return metrics


def compare(
    runs: Sequence[Run | Path | str], metrics: Sequence[str] = (), resamples: int = 2000
) -> dict[str, Any]:
    """Test every metric's difference between the first run and each other, paired by patient.

    Arguments, result and errors are those of `hmil_fast.evaluation.compare.compare_runs`; a run may
    be given by its folder.

    Example:
        >>> import hmil_fast
        >>> result = hmil_fast.compare(["run", "run/baseline"], resamples=100)
        >>> result["slides"]
        12
    """
    return compare_runs([as_run(run) for run in runs], metrics, resamples)


def export(run: Run | Path | str, out: Path, fold: int | None = None) -> dict[Path, float]:
    """Export one fold of a run, or all, as ONNX files that need nothing of this library.

    Returns:
        The files, each with its largest difference from the model, see `export_run`.

    Raises:
        UsageError: See `hmil_fast.evaluation.export.export_run`.
    """
    return export_run(as_run(run), out, None if fold is None else [fold])
