"""The commands over finished runs, as `hmil_fast.cli.main` shows them."""

import argparse

from hmil_fast.cli.options import (
    Command,
    Commands,
    add_command,
    count,
    count_or_none,
    path,
    risk,
    store,
)


def add_results(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `evaluate`, `predict`, `heatmap`, `report`."""

    def command(name: str) -> Command:
        def run(args: argparse.Namespace) -> int:
            from hmil_fast.api import results

            return int(getattr(results, name)(args))

        return run

    def with_files(name: str) -> Command:
        def run(args: argparse.Namespace) -> int:
            args.files = {}
            if args.slides:
                # on some kernels cuCIM must be loaded before torch
                import hmil_fast.io.slide  # noqa: F401
                from hmil_fast.extraction.slides import collect_slides

                args.files = {task.slide_id: task.path for task in collect_slides(args.slides)}
            return command(name)(args)

        return run

    evaluate = add_command(
        commands, "evaluate", "Metrics of a run, or of it on another cohort.", command("evaluate")
    )
    evaluate.add_argument("run_path", type=path, metavar="RUN")
    evaluate.add_argument(
        "--store",
        type=store,
        metavar="STORE",
        help="features of the other cohort, or of the run's own",
    )
    evaluate.add_argument("--labels", type=path, metavar="CSV", help="labels of the other cohort")
    evaluate.add_argument(
        "--risk",
        type=risk,
        metavar="SHARE",
        help="accepted share of conformal answers that miss the true leaf (default: 0.1, or as "
        "in the last evaluation)",
    )
    evaluate.add_argument(
        "--sensitivity",
        type=risk,
        metavar="SHARE",
        help="choose the threshold of one class (--of) on validation slides so that this share of "
        "its slides is found, and report sensitivity and specificity on the test slides",
    )
    evaluate.add_argument("--of", metavar="NODE", help="node of the tree for --sensitivity")
    evaluate.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        help="folder for metrics.json, predictions.csv and report.html of the other cohort",
    )
    evaluate.add_argument("--json", action="store_true", help="print the metrics as JSON")
    predict = add_command(
        commands, "predict", "Predict slides of a store; CSV on stdout.", command("predict")
    )
    predict.add_argument("run_path", type=path, metavar="RUN")
    predict.add_argument("--store", type=store, required=True, metavar="STORE")
    predict.add_argument(
        "slides", nargs="*", metavar="SLIDE_ID", help="all of the store by default"
    )
    predict.set_defaults(words="slides")
    predict.add_argument("--out", type=path, metavar="CSV", help="write there instead of stdout")
    predict.add_argument(
        "--risk",
        type=risk,
        metavar="SHARE",
        help="add the deepest node, and a set of leaves, that misses no more than this share",
    )
    heatmap = add_command(
        commands, "heatmap", "Attention per tree node over the slide.", with_files("heatmap")
    )
    heatmap.add_argument("run_path", type=path, metavar="RUN")
    heatmap.add_argument("slide", metavar="SLIDE_ID")
    heatmap.add_argument("--store", type=store, required=True, metavar="STORE")
    heatmap.add_argument("--out", type=path, required=True, metavar="PNG")
    heatmap.add_argument(
        "--node",
        action="append",
        default=[],
        metavar="NAME",
        help="a tree node to draw; may be repeated",
    )
    heatmap.add_argument(
        "--top-k",
        type=count,
        metavar="K",
        help="draw the K tiles of the highest attention of every node, too; needs --slides",
    )
    heatmap.add_argument(
        "--scale",
        choices=("share", "rank"),
        default="share",
        help="colour by attention, times the even share (default), or by rank within the slide",
    )
    report = add_command(
        commands, "report", "Write the run's report, one HTML file.", with_files("report")
    )
    report.add_argument("run_path", type=path, metavar="RUN")
    report.add_argument(
        "--store", type=store, metavar="STORE", help="show the slides under their attention"
    )
    report.add_argument(
        "--heatmaps",
        type=count_or_none,
        default=100,
        metavar="N",
        help="show at most N more slides (100)",
    )
    report.add_argument(
        "--overwrite",
        action="store_true",
        help="write the report although the store lacks some of the run's slides",
    )
    for parser in (evaluate, predict, report):
        parser.add_argument(
            "--prior",
            metavar="PRIOR",
            help="how frequent the leaves are: balanced (the children of every node alike), "
            "cohort (as among the run's slides) or a CSV file label,share (default: balanced, or "
            "as in the last evaluation)",
        )
    for parser in (heatmap, report):
        parser.add_argument(
            "--slides",
            nargs="+",
            default=[],
            metavar="SLIDES",
            help="slide files, folders or globs, as extracted: cut tiles from them",
        )


def add_compare(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `compare`."""

    def run(args: argparse.Namespace) -> int:
        from hmil_fast.evaluation.compare import compare

        return compare(args)

    text = "Test runs against the first one, on the same slides, paired by patient."
    parser = add_command(commands, "compare", text, run)
    parser.add_argument("run_path", type=path, metavar="RUN")
    parser.add_argument("others", nargs="+", type=path, metavar="RUN")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="what the question is about, for instance balanced_accuracy; may be repeated. Their p "
        "values are corrected for their number (AUC, balanced accuracy, F1, distance)",
    )
    parser.add_argument(
        "--draws", type=count, default=2000, metavar="N", help="resamples and permutations (2000)"
    )
    parser.add_argument("--json", action="store_true", help="the comparison as JSON on stdout")


def add_export(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `export`."""

    def run(args: argparse.Namespace) -> int:
        from hmil_fast.evaluation.export import export

        return export(args)

    text = "Export trained models as ONNX files, checked against onnxruntime."
    parser = add_command(commands, "export", text, run)
    parser.add_argument("run_path", type=path, metavar="RUN")
    parser.add_argument("--out", type=path, required=True, metavar="DIR")
    parser.add_argument("--fold", type=int, metavar="I", help="this fold only, from 0 (all)")
