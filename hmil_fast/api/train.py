"""Train by cross-validation, with the baseline beside the model, then evaluate."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from hmil_fast.api.opening import run_features
from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.labelled import with_features
from hmil_fast.bags.manifest import read_manifest
from hmil_fast.bags.splits import Slide, read_labels
from hmil_fast.config import Runtime, TrainConfig
from hmil_fast.device import pick_device
from hmil_fast.evaluation.evaluate import evaluate_run
from hmil_fast.evaluation.model_card import write_card
from hmil_fast.evaluation.predict import write_validation
from hmil_fast.io.store import FeatureStore, at_scale, at_view, join_scales, open_store
from hmil_fast.io.store.location import Location
from hmil_fast.labels import LabelTree
from hmil_fast.runs.run import Run, create_run, removed_if_refused
from hmil_fast.training import distributed
from hmil_fast.training.choose_folds import choose_folds, warn_of_near_duplicates
from hmil_fast.training.loop import EpochReport, train_run
from hmil_fast.training.standardise import WIDE_RATIO

Report = Callable[[EpochReport | str], None]


def no_report(event: EpochReport | str) -> None:
    """Report nothing."""


def train(
    store: FeatureStore | Location | str,
    labels: Sequence[Slide] | Path | str,
    tree: LabelTree | Path | str,
    out: Path | str,
    config: TrainConfig = TrainConfig(),
    *,
    splits: Path | str | None = None,
    runtime: Runtime = Runtime(),
    report: Report = no_report,
) -> Run:
    """Train a run and its baseline on the same folds, or resume them; then evaluate.

    Under torchrun every process calls this; only the first one writes and reports.

    Args:
        store: A feature store, or its place.
        labels: Labelled slides, or a CSV file slide_id,label[,patient_id][,split].
        tree: The label tree, or a YAML file of it.
        out: The run folder; the baseline's is `out/baseline`.
        config: Data, folds and recipe.
        splits: A splits.json whose folds are taken as they are; by default folds are made.
        runtime: Device, cache, precision and threads; not part of the run's identity.
        report: Called with each note, a text, and with an `EpochReport` after each epoch.

    Returns:
        The run; its metrics.json holds the metrics of both models.

    Raises:
        UsageError: A file or setting cannot be used, or `out` holds another run.
        StoreError: The store is missing or damaged.
        Stopped: Ctrl-C or SIGTERM; the same call resumes.

    Example:
        >>> import hmil_fast
        >>> from hmil_fast import Recipe, TrainConfig
        >>> config = TrainConfig(Recipe(hidden=8, epochs=2), baseline="none", folds=2)
        >>> run = hmil_fast.train("features", "labels.csv", "tree.yaml", "small-run", config)
        >>> run.is_done(0), run.is_done(1)
        (True, True)
    """
    out = Path(out)
    splits = None if splits is None else Path(splits)
    with distributed.process_group(pick_device(runtime.device, runtime.threads)):
        if distributed.rank():
            report = no_report
        tree = tree if isinstance(tree, LabelTree) else LabelTree.from_yaml(Path(tree))
        if isinstance(labels, Path | str):
            labels = read_labels(Path(labels), tree, say=report)
        store = store if isinstance(store, FeatureStore) else open_store(store)
        store = (
            join_scales(store) if config.scales == "all" else at_scale(store, config.mpp or None)
        )
        at_view(store, config.views)  # refused before anything is written
        return _train(store, labels, tree, out, config, splits, runtime, report)


def _train(
    store: FeatureStore,
    labels: Sequence[Slide],
    tree: LabelTree,
    out: Path,
    config: TrainConfig,
    splits: Path | None,
    runtime: Runtime,
    report: Report,
) -> Run:
    slides = with_features(store, labels, report)
    folds, slides = choose_folds(store, slides, tree, config, splits, report, out)
    made_with = None if splits is None else read_manifest(splits).made_with
    if distributed.rank():
        distributed.wait_for_all()  # the first one sets the folders up
    fresh = not distributed.rank() and not (out / "config.yaml").exists()
    split = (folds, slides)
    run = create_run(out, config, tree, split, store, made_with, runtime.precision)
    runs = [run]
    if config.baseline not in ("none", config.recipe.model):
        recipe = dataclasses.replace(config.recipe, model=config.baseline)
        beside = dataclasses.replace(config, recipe=recipe, baseline="none")
        place = out / "baseline"
        runs.append(create_run(place, beside, tree, split, store, made_with, runtime.precision))
    if not distributed.rank():
        distributed.wait_for_all()
    cache = None
    for each in runs:
        done = all(each.is_done(fold) for fold in range(len(folds)))
        done, _ = distributed.broadcast(done and (each.path / "predictions.csv").exists())
        if done:
            report(f"{each.config.recipe.model}: all {len(folds)} folds are trained already")
            continue
        if cache is None:
            with removed_if_refused(runs if fresh else []):
                cache = _features(store, run, report, runtime, config.views)
            if not distributed.rank():
                warn_of_near_duplicates(folds, cache, report)
        train_run(each, cache, _with_scale_note(each, report), runtime)
    if distributed.rank():
        return run
    for each in runs:
        if not all(each.val_path(fold).exists() for fold in range(len(folds))):
            cache = cache or _features(store, run, report, runtime)
            write_validation(each, cache, runtime)
    evaluate_run(run)
    for each in runs:
        write_card(each)
    return run


def _features(
    store: FeatureStore, run: Run, report: Report, runtime: Runtime, views: int = 0
) -> FeatureCache:
    cache = run_features(store, run, report, runtime, views)
    report(f"features: {cache.describe()}")
    return cache


def _with_scale_note(run: Run, report: Report) -> Callable[[EpochReport], None]:
    """Add to the reports of a run one note if the features' columns differ in magnitude."""
    noted = False

    def epoch(event: EpochReport) -> None:
        nonlocal noted
        if event.column_ratio >= WIDE_RATIO and not noted:
            noted = True
            report(
                f"columns of the features differ in size by a factor of {event.column_ratio:,.0f}: "
                + (
                    "standardise=auto brings them to one scale"
                    if run.config.recipe.standardise == "none"
                    else "each is brought to mean 0 and deviation 1 of the training bags "
                    "(standardise=none takes them as they are)"
                )
            )
        report(event)

    return epoch
