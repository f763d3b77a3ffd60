"""Train by cross-validation, with the baseline beside the model, then evaluate."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hmil_fast.api.results import console, notes, print_table, run_features
from hmil_fast.bags.labelled import with_features
from hmil_fast.bags.manifest import read_manifest
from hmil_fast.bags.splits import Slide, read_labels
from hmil_fast.config import TrainConfig, load_config
from hmil_fast.device import pick_device
from hmil_fast.evaluation import evaluate as evaluation
from hmil_fast.evaluation.model_card import write_card
from hmil_fast.evaluation.predict import write_validation
from hmil_fast.io.store import FeatureStore, at_scale, at_view, join_scales, open_store
from hmil_fast.labels import LabelTree
from hmil_fast.runs.archive import set_aside
from hmil_fast.runs.run import Run, create_run, set_up_for_nothing
from hmil_fast.training import distributed
from hmil_fast.training.choose_folds import choose_folds, warn_of_near_duplicates
from hmil_fast.training.loop import EpochReport, train_run
from hmil_fast.training.standardise import APART


def train(args: argparse.Namespace) -> int:
    """Train, with the baseline beside it, evaluate, and print the table."""
    names = ("model", "preset", "folds", "epochs", "mpp", "seed")
    flags = {name: getattr(args, name) for name in names}
    config = load_config(args.config, args.settings, {**flags, "device": args.device})
    tree = LabelTree.from_yaml(args.tree)
    with distributed.process_group(pick_device(config.device)):
        say = notes(console())
        slides = read_labels(args.labels, tree, say=say, leaves_only=args.leaves_only)
        if args.overwrite and distributed.rank() == 0:
            set_aside(args.out)
        store = open_store(args.store)
        run = train_and_evaluate(store, slides, tree, config, args.out, args.splits)
        if distributed.rank() == 0:
            print_table(run)
    distributed.finish()
    return 0


def train_and_evaluate(
    store: FeatureStore,
    slides: Sequence[Slide],
    tree: LabelTree,
    config: TrainConfig,
    out: Path,
    splits: Path | None = None,
) -> Run:
    """Train a run and its baseline on the same folds, or resume; write metrics.json.

    The folds are those of the manifest `splits`, or are made of the slides.

    Under torchrun every process calls this; the first one writes.
    """
    err = console()
    say = notes(err)
    store = join_scales(store) if config.scales == "all" else at_scale(store, config.mpp or None)
    at_view(store, config.views)  # refused before anything is written
    present = with_features(store, slides, say)
    folds, present = choose_folds(store, present, tree, config, splits, say, out)
    made_with = None if splits is None else read_manifest(splits).made_with
    if distributed.rank():
        distributed.wait_for_all()  # the first one sets the folders up
    fresh = not distributed.rank() and not (out / "config.yaml").exists()
    run = create_run(out, config, tree, (folds, present), store, made_with)
    runs = [run]
    if config.baseline not in ("none", config.model):
        beside = dataclasses.replace(config, model=config.baseline, baseline="none")
        runs.append(create_run(out / "baseline", beside, tree, (folds, present), store, made_with))
    if not distributed.rank():
        distributed.wait_for_all()
    cache = None
    for each in runs:
        done = all(each.is_done(fold) for fold in range(len(folds)))
        done, _ = distributed.from_first(done and (each.path / "predictions.csv").exists())
        if done:
            err.print(f"{each.config.model}: all {len(folds)} folds are trained already")
            continue
        if cache is None:
            with set_up_for_nothing(runs if fresh else []):
                cache = run_features(store, run, err, config.views)
            if not distributed.rank():
                warn_of_near_duplicates(folds, cache, say)
        with _EpochBar(err, each) as bar:
            train_run(each, cache, bar.update)
    if distributed.rank():
        return run
    for each in runs:
        if not all(each.val_path(fold).exists() for fold in range(len(folds))):
            cache = cache or run_features(store, run, err)
            write_validation(each, cache)
    evaluation.evaluate_run(run)
    for each in runs:
        write_card(each)
    return run


class _EpochBar:
    """Progress over all folds; a fold that stops early gives back its epochs."""

    def __init__(self, console: Console, run: Run) -> None:
        self._epochs, self._folds = run.config.epochs, len(run.folds)
        columns = (TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True)
        total = self._epochs * self._folds
        self._name, self._standardise = run.config.model, run.config.standardise
        self._said = False
        self._task = self._bar.add_task(self._name, total=total)
        self._console = console

    def __enter__(self) -> "_EpochBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, report: EpochReport) -> None:
        """An epoch, or a whole fold, has ended."""
        completed = report.fold * self._epochs + report.epoch + 1
        text = (
            f"{self._name} fold {report.fold} of 0–{self._folds - 1} epoch {report.epoch + 1} "
            f"loss {report.loss:.3f}"
        )
        if report.apart >= APART and not self._said:
            self._said = True
            mended = (
                "each is brought to mean 0 and deviation 1 of the training bags "
                "(standardise=none takes them as they are)"
            )
            if self._standardise == "none":
                mended = "standardise=auto brings them to one scale"
            self._console.print(
                "[yellow]note:[/] columns of the features differ in size by a factor of "
                f"{report.apart:,.0f}: {mended}"
            )
        if report.last:
            completed = (report.fold + 1) * self._epochs
            self._console.print(
                f"[green]✓[/] {self._name} fold {report.fold} of 0–{self._folds - 1}: "
                f"best epoch {report.best_epoch + 1} of {report.epoch + 1}, "
                f"validation loss {report.val_loss:.3f}, {report.instances_per_s:,.0f} "
                f"instances/s, {report.bags_per_s:,.1f} bags/s, waited for data "
                f"{report.data_share:.1%} of the time"
            )
        self._bar.update(self._task, completed=completed, description=text)
