"""The commands over trained runs: predict, evaluate, heatmap, report, compare, export."""

import argparse
import json
import sys
from collections.abc import Callable

from hmil_fast.cli.options import (
    Command,
    Commands,
    add_command,
    add_old_name,
    count,
    count_or_none,
    fraction,
    path,
    store,
)
from hmil_fast.config import Runtime
from hmil_fast.errors import UsageError


def add_results(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `evaluate`, `predict`, `heatmap`, `report`."""
    _add_evaluate(commands)
    _add_predict(commands)
    _add_heatmap(commands)
    _add_report(commands)


def _add_evaluate(commands: "Commands[argparse.ArgumentParser]") -> None:
    def run(args: argparse.Namespace) -> int:
        from hmil_fast.api.evaluate import evaluate
        from hmil_fast.cli.tables import print_metrics
        from hmil_fast.evaluation.evaluate import EvaluationOptions
        from hmil_fast.evaluation.operating_point import OperatingPoint

        if (args.sensitivity is None) != (args.of is None):
            raise UsageError(
                "an operating point needs --sensitivity and --of", "give both, or neither"
            )
        point = None if args.of is None else OperatingPoint(args.of, args.sensitivity)
        metrics = evaluate(
            args.run_path,
            args.store,
            args.labels,
            out=args.out,
            options=EvaluationOptions(args.alpha, args.prior, point),
            runtime=Runtime(args.device),
            say=_note(),
        )
        if args.json:
            print(json.dumps(metrics, indent=1, allow_nan=False))
        else:
            print_metrics(metrics)
        if args.out is not None:
            print(f"report: {args.out / 'report.html'}", file=sys.stderr)
        return 0

    text = "Measure a run on its own test slides, or on another cohort."
    parser = _add_run_command(commands, "evaluate", text, run)
    parser.add_argument(
        "--store",
        type=store,
        metavar="STORE",
        help="features of the other cohort; or of the run's own slides, to predict validation "
        "slides again whose predictions are missing",
    )
    parser.add_argument(
        "--labels",
        type=path,
        metavar="CSV",
        help="labels of the other cohort (default: evaluate the run's own test slides)",
    )
    _add_alpha(parser, " (default: 0.1, or as in the last evaluation)")
    parser.add_argument(
        "--sensitivity",
        type=fraction,
        metavar="SHARE",
        help="sensitivity that the threshold of one class (--of) reaches on validation slides; "
        "adds sensitivity and specificity on the test slides (default: as in the last evaluation)",
    )
    parser.add_argument("--of", metavar="NODE", help="node of the tree for --sensitivity")
    parser.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        help="folder for metrics.json, predictions.csv and report.html of the other cohort "
        "(default: print the metrics only)",
    )
    _add_prior(parser)
    _add_device(parser)
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")


def _add_predict(commands: "Commands[argparse.ArgumentParser]") -> None:
    def run(args: argparse.Namespace) -> int:
        from hmil_fast.api.predict import predict

        predictions = predict(
            args.run_path,
            args.store,
            args.slides,
            prior=args.prior,
            alpha=args.alpha,
            runtime=Runtime(args.device),
            say=_note(),
        )
        predictions.write(args.out or sys.stdout)
        return 0

    text = "Predict slides of a store; CSV on stdout."
    parser = _add_run_command(commands, "predict", text, run)
    parser.add_argument("--store", type=store, required=True, metavar="STORE")
    parser.add_argument(
        "slides", nargs="*", metavar="SLIDE_ID", help="slides to predict (default: all)"
    )
    parser.set_defaults(words="slides")
    parser.add_argument(
        "--out", type=path, metavar="CSV", help="file for the predictions (default: stdout)"
    )
    _add_alpha(parser, "; adds the deepest node and the set of leaves (default: neither)")
    _add_prior(parser)
    _add_device(parser)


def _add_heatmap(commands: "Commands[argparse.ArgumentParser]") -> None:
    def run(args: argparse.Namespace) -> int:
        from hmil_fast.api.report import heatmap
        from hmil_fast.report.heatmap import HeatmapOptions
        from hmil_fast.runs.run import open_run

        opened = open_run(args.run_path)
        prediction = heatmap(
            opened,
            args.store,
            args.slide,
            args.out,
            slides=args.slides,
            options=HeatmapOptions(args.node, args.top_k, args.scale),
            runtime=Runtime(args.device),
            say=_note(),
        )
        for names, p in zip(opened.tree.names, prediction.probabilities, strict=True):
            likeliest = ", ".join(f"{names[k]} {p[k]:.2f}" for k in (-p).argsort()[:4])
            print(f"{args.slide}: {likeliest}")
        print(f"heatmap: {args.out}")
        return 0

    text = "Draw the attention per node of the label tree over one slide."
    parser = _add_run_command(commands, "heatmap", text, run)
    parser.add_argument("slide", metavar="SLIDE_ID")
    parser.add_argument("--store", type=store, required=True, metavar="STORE")
    parser.add_argument("--out", type=path, required=True, metavar="PNG")
    parser.add_argument(
        "--node",
        action="append",
        default=[],
        metavar="NAME",
        help="node of the tree to draw; repeatable (default: all, or the likeliest of many)",
    )
    parser.add_argument(
        "--top-k",
        type=count,
        metavar="K",
        help="number of tiles to draw per node, those of the highest attention; needs --slides "
        "(default: none)",
    )
    parser.add_argument(
        "--scale",
        choices=("share", "rank"),
        default="share",
        help="meaning of the colours: attention as a multiple of the even share, or its rank "
        "within the slide (default: share)",
    )
    _add_slides(parser)
    _add_device(parser)


def _add_report(commands: "Commands[argparse.ArgumentParser]") -> None:
    def run(args: argparse.Namespace) -> int:
        from hmil_fast.api.report import ReportOptions, report
        from hmil_fast.cli.console import track_slides

        written = report(
            args.run_path,
            args.store,
            slides=args.slides,
            options=ReportOptions(args.heatmaps, args.allow_missing, args.prior),
            runtime=Runtime(args.device),
            say=_note(),
            track=track_slides,
        )
        print(f"report: {written}")
        return 0

    text = "Write the run's report, one HTML file."
    parser = _add_run_command(commands, "report", text, run)
    parser.add_argument(
        "--store",
        type=store,
        metavar="STORE",
        help="features of the run's slides, to show the slides under their attention "
        "(default: a report without slides)",
    )
    parser.add_argument(
        "--heatmaps",
        type=count_or_none,
        default=100,
        metavar="N",
        help="at most N more slides: those drawn by an earlier report are kept (default: 100)",
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="write the report although the store lacks some of the run's slides",
    )
    add_old_name(parser, "--overwrite", dest="allow_missing", action="store_true")
    _add_prior(parser)
    _add_slides(parser)
    _add_device(parser)


def add_compare(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `compare`."""

    def run(args: argparse.Namespace) -> int:
        from hmil_fast.api.evaluate import compare
        from hmil_fast.cli.tables import print_comparison

        result = compare([args.run_path, *args.others], args.metric, args.resamples)
        if args.json:
            print(json.dumps(result, indent=1, allow_nan=False))
        else:
            print_comparison(result)
            print("--json prints every metric, --metric chooses the tested ones", file=sys.stderr)
        return 0

    text = "Test runs against the first one, on the same slides, paired by patient."
    parser = _add_run_command(commands, "compare", text, run)
    parser.add_argument("others", nargs="+", type=path, metavar="RUN")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="metric to test, for instance balanced_accuracy; repeatable; Holm-corrected "
        "(default: AUC, balanced accuracy, macro F1, hierarchical F1, mean tree distance)",
    )
    parser.add_argument(
        "--resamples",
        type=count,
        default=2000,
        metavar="N",
        help="number of bootstrap draws, and of permutations (default: 2000)",
    )
    add_old_name(parser, "--draws", dest="resamples", type=count)
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")


def add_export(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `export`."""

    def run(args: argparse.Namespace) -> int:
        from hmil_fast.api.evaluate import export

        for file, difference in export(args.run_path, args.out, args.fold).items():
            print(f"{file}: onnxruntime differs by {difference:.1e} at most")
        return 0

    text = "Export trained models as ONNX files, checked against onnxruntime."
    parser = _add_run_command(commands, "export", text, run)
    parser.add_argument("--out", type=path, required=True, metavar="DIR")
    parser.add_argument("--fold", type=int, metavar="I", help="fold, from 0 (default: all)")


def _add_run_command(
    commands: "Commands[argparse.ArgumentParser]", name: str, text: str, run: Command
) -> argparse.ArgumentParser:
    parser = add_command(commands, name, text, run)
    parser.add_argument("run_path", type=path, metavar="RUN")
    return parser


def _add_alpha(parser: argparse.ArgumentParser, default: str) -> None:
    text = f"error rate allowed for conformal predictions{default}"
    parser.add_argument("--alpha", type=fraction, metavar="RATE", help=text)
    add_old_name(parser, "--risk", dest="alpha", type=fraction)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="device: auto, cpu or cuda[:i] (default: auto, a GPU where there is one)",
    )


def _add_prior(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prior",
        metavar="PRIOR",
        help="frequency of each leaf: balanced (equal for the children of every node), cohort (as "
        "among the run's slides) or a CSV file label,share (default: balanced, or as in the last "
        "evaluation)",
    )


def _add_slides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slides",
        nargs="+",
        default=[],
        metavar="SLIDES",
        help="slide files, folders or globs, as extracted, to cut tiles from (default: none)",
    )


def _note() -> Callable[[str], None]:
    from hmil_fast.cli.console import notes, stderr

    return notes(stderr())
