"""The commands over a run as a person sees them: train, evaluate, predict, heatmap, report."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.labelled import name_empty, with_features
from hmil_fast.bags.manifest import read_manifest
from hmil_fast.bags.splits import Slide, read_labels
from hmil_fast.config import TrainConfig, load_config
from hmil_fast.device import pick_device
from hmil_fast.errors import UsageError
from hmil_fast.evaluation import evaluate as evaluation
from hmil_fast.evaluation.model_card import write_card
from hmil_fast.evaluation.operating_point import OperatingPoint
from hmil_fast.evaluation.predict import predict_slides, write_validation
from hmil_fast.evaluation.prior import current_prior, read_prior
from hmil_fast.evaluation.uncertainty import answer_new_slides
from hmil_fast.io.store import FeatureStore, at_scale, at_view, join_scales, open_store
from hmil_fast.io.store.location import Location
from hmil_fast.labels import LabelTree
from hmil_fast.report.heatmap import draw_heatmap
from hmil_fast.report.html.page import write_report
from hmil_fast.report.viewer_data import make_views
from hmil_fast.runs.archive import set_aside
from hmil_fast.runs.predictions import write_predictions
from hmil_fast.runs.run import Run, create_run, open_run, set_up_for_nothing
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
        say = _notes(_console())
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
    err = _console()
    say = _notes(err)
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
                cache = _features(store, run, err, config.views)
            if not distributed.rank():
                warn_of_near_duplicates(folds, cache, say)
        with _EpochBar(err, each) as bar:
            train_run(each, cache, bar.update)
    if distributed.rank():
        return run
    for each in runs:
        if not all(each.val_path(fold).exists() for fold in range(len(folds))):
            cache = cache or _features(store, run, err)
            write_validation(each, cache)
    evaluation.evaluate_run(run)
    for each in runs:
        write_card(each)
    return run


def evaluate(args: argparse.Namespace) -> int:
    """Metrics of a run's own test slides, or of another labelled cohort."""
    run = open_run(args.run_path)
    if args.store is None and args.labels is not None:
        raise UsageError("another cohort needs --store and --labels", "give both, or neither")
    if args.labels is None and args.out is not None:
        raise UsageError(
            f"the metrics of the run's own slides go into {run.path}",
            "leave out --out, or give --labels",
        )
    if (args.sensitivity is None) != (args.of is None):
        raise UsageError("an operating point needs --sensitivity and --of", "give both, or neither")
    asked = evaluation.Asked(
        args.risk,
        None if args.prior is None else read_prior(run, args.prior),
        None if args.of is None else OperatingPoint(args.of, args.sensitivity),
    )
    store = None if args.store is None else _open_for(run, args.store)
    if args.labels is None or store is None:
        if store is not None:
            write_validation(run, _features(store, run, Console(stderr=True, soft_wrap=True)))
        metrics = evaluation.evaluate_run(run, asked)
        write_card(run)
        if (run.path / "report.html").exists():
            Console(stderr=True, soft_wrap=True).print(
                f"{run.path / 'report.html'} shows an earlier evaluation: `hmil-fast report` makes "
                "a new one",
                markup=False,
            )
    else:
        say = _notes(_console())
        slides = read_labels(args.labels, run.tree, inner=True, say=say)
        slides = with_features(store, slides, say)
        cache = FeatureCache(store, [slide.slide_id for slide in slides], run.path)
        name_empty(cache, say)
        metrics = evaluation.evaluate_cohort(run, cache, slides, asked, args.out)
    if args.json:
        print(json.dumps(metrics, indent=1, allow_nan=False))
    else:
        _print(metrics)
    if args.out is not None:
        print(f"report: {write_report(args.out)}", file=sys.stderr)
    return 0


def predict(args: argparse.Namespace) -> int:
    """Write predictions of slides of a store as CSV."""
    run = open_run(args.run_path)
    store = _open_for(run, args.store)
    slide_ids = list(dict.fromkeys(args.slides)) or store.slide_ids()
    for name in sorted(store.unnamed):
        _notes(_console())(f"{name} is left out: its commit cannot be read, see `store verify`")
    if not slide_ids:
        raise UsageError(f"the store {store.path} holds no slide", "extract some first")
    tested = {slide_id for fold in run.folds for slide_id in fold.test}
    known = {slide_id for fold in run.folds for slide_id in fold.parts()} - tested
    if seen := sum(slide_id in known for slide_id in slide_ids):
        Console(stderr=True, soft_wrap=True).print(
            f"[yellow]{seen} of these slides taught the run and were tested by no fold of it:[/] "
            "their predictions, and their answers to --risk, are better than on new slides"
        )
    prior = current_prior(run) if args.prior is None else read_prior(run, args.prior)
    predictions = predict_slides(run, FeatureCache(store, slide_ids, run.path), prior)
    answers = None
    if args.risk is not None:
        answers = answer_new_slides(run, predictions, prior, args.risk)
    write_predictions(args.out or sys.stdout, run.tree, predictions, answers)
    return 0


def heatmap(args: argparse.Namespace) -> int:
    """Draw one slide's attention and say what the run predicts for it."""
    run = open_run(args.run_path)
    store = _open_for(run, args.store)
    slide = args.files.get(args.slide)
    if args.top_k is not None and slide is None:
        raise UsageError(
            f"--top-k cuts tiles from the slide, and --slides names no slide {args.slide!r}",
            "give --slides the files or folders that were extracted",
        )
    prediction, notes = draw_heatmap(
        run, store, args.slide, args.out, args.node, slide, args.top_k, args.scale
    )
    for note in notes:
        Console(stderr=True, soft_wrap=True).print(f"[yellow]note:[/] {escape(note)}")
    out = Console(soft_wrap=True, highlight=False)
    for names, p in zip(run.tree.names, prediction.probabilities, strict=True):
        best = ", ".join(f"{names[k]} {p[k]:.2f}" for k in (-p).argsort()[:4])
        out.print(f"{args.slide}: {best}", markup=False)
    out.print(f"heatmap: {args.out}", markup=False)
    return 0


def report(args: argparse.Namespace) -> int:
    """Write the report, with the slides' views where a store is given."""
    run = open_run(args.run_path)
    prior = None if args.prior is None else read_prior(run, args.prior)
    known = {slide.slide_id for slide in run.slides}
    if args.files and (args.store is None or not known & args.files.keys()):
        raise UsageError(
            "--slides cuts tiles of slides in the store, and there is no --store"
            if args.store is None
            else f"--slides names no slide of {run.path}, for instance {sorted(args.files)[0]!r}",
            "give --store too, and the files or folders that were extracted",
        )
    store = None if args.store is None else _open_for(run, args.store)
    if store is not None:
        _refuse_another_store(run, store, partly=args.overwrite)
    if prior is None:
        evaluation.read_metrics(run)
    else:
        evaluation.evaluate_run(run, evaluation.Asked(prior=prior))
    if store is not None:
        make_views(run, store, args.heatmaps, args.files)
    print(f"report: {write_report(run.path)}")
    return 0


def _open_for(run: Run, path: Location) -> FeatureStore:
    """A store that fits a run; slides of the run that changed since are named.

    Raises:
        UsageError: The store is of another kind.
    """
    store = run.fitting(open_store(path))
    changed = run.changed(store)
    if changed:
        names = ", ".join(changed[:5]) + (", …" if len(changed) > 5 else "")
        Console(stderr=True, soft_wrap=True).print(
            f"[yellow]{len(changed)} slides have other features than when {escape(str(run.path))} "
            f"was trained:[/] {escape(names)}",
        )
    return store


def _refuse_another_store(run: Run, store: FeatureStore, *, partly: bool) -> None:
    """Refuse to draw a run's slides from a store that has none, or not all, of them.

    Raises:
        UsageError: It is such a store.
    """
    tested = {slide_id for fold in run.folds for slide_id in fold.test}
    missing = sorted(tested - set(store.slide_ids()))
    if len(missing) == len(tested) or (missing and not partly):
        raise UsageError(
            f"the store {store.path} lacks {len(missing)} of the {len(tested)} slides that "
            f"{run.path} tested, {missing[0]!r} for instance",
            "name the store that it was trained on, or leave out --store"
            + ("" if partly else "; --overwrite writes the report without these slides"),
        )


def print_table(run: Run) -> None:
    """Print the run's results beside its baseline's."""
    _print(evaluation.read_metrics(run))


def _print(metrics: dict[str, Any]) -> None:
    head, rows = evaluation.table_rows(metrics)
    pooled = metrics["pooled"]
    title = f"{pooled['slides']} slides of {pooled['patients']} patients, [95 % interval]"
    table = Table(*head, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.no_wrap = True
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    if "conformal" in metrics:
        console.print(f"conformal answers: {metrics['conformal']['note']}", markup=False)


def _features(store: FeatureStore, run: Run, err: Console, views: int = 0) -> FeatureCache:
    """The features of a run's slides, where its settings want them."""
    # slides that are tested together lie together: they are predicted without a copy
    tested = [slide_id for fold in run.folds for slide_id in fold.test]
    together = dict.fromkeys([*tested, *(slide.slide_id for slide in run.slides)])
    device = pick_device(run.config.device)
    cache = FeatureCache(store, list(together), run.path, run.config.cache, device, views)
    err.print(f"features: {cache.describe()}")
    name_empty(cache, _notes(err))
    return cache


def _console() -> Console:
    """Where people are told what happens; of several processes only the first one speaks."""
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=distributed.rank() > 0)


def _notes(err: Console) -> Callable[[str], None]:
    def say(line: str) -> None:
        err.print(f"[yellow]note:[/] {escape(line)}")

    return say


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
