"""The commands over a trained run: evaluate, predict, heatmap, report."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.labelled import name_empty, with_features
from hmil_fast.bags.splits import read_labels
from hmil_fast.device import pick_device
from hmil_fast.errors import UsageError
from hmil_fast.evaluation import evaluate as evaluation
from hmil_fast.evaluation.model_card import write_card
from hmil_fast.evaluation.operating_point import OperatingPoint
from hmil_fast.evaluation.predict import predict_slides, write_validation
from hmil_fast.evaluation.prior import current_prior, read_prior
from hmil_fast.evaluation.uncertainty import answer_new_slides
from hmil_fast.io.store import FeatureStore, open_store
from hmil_fast.io.store.location import Location
from hmil_fast.report.heatmap import draw_heatmap
from hmil_fast.report.html.page import write_report
from hmil_fast.report.viewer_data import make_views
from hmil_fast.runs.predictions import write_predictions
from hmil_fast.runs.run import Run, open_run
from hmil_fast.training import distributed


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
            write_validation(run, run_features(store, run, Console(stderr=True, soft_wrap=True)))
        metrics = evaluation.evaluate_run(run, asked)
        write_card(run)
        if (run.path / "report.html").exists():
            Console(stderr=True, soft_wrap=True).print(
                f"{run.path / 'report.html'} shows an earlier evaluation: `hmil-fast report` makes "
                "a new one",
                markup=False,
            )
    else:
        say = notes(console())
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
        notes(console())(f"{name} is left out: its commit cannot be read, see `store verify`")
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


def console() -> Console:
    """Where people are told what happens; of several processes only the first one speaks."""
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=distributed.rank() > 0)


def notes(err: Console) -> Callable[[str], None]:
    """A function that prints a note."""

    def say(line: str) -> None:
        err.print(f"[yellow]note:[/] {escape(line)}")

    return say


def run_features(store: FeatureStore, run: Run, err: Console, views: int = 0) -> FeatureCache:
    """The features of a run's slides, where its settings want them."""
    # slides that are tested together lie together: they are predicted without a copy
    tested = [slide_id for fold in run.folds for slide_id in fold.test]
    together = dict.fromkeys([*tested, *(slide.slide_id for slide in run.slides)])
    device = pick_device(run.config.device)
    cache = FeatureCache(store, list(together), run.path, run.config.cache, device, views)
    err.print(f"features: {cache.describe()}")
    name_empty(cache, notes(err))
    return cache
