"""The commands that make a run: `splits import`, `train`."""

import argparse

from hmil_fast.cli.options import Commands, add_command, count, path, positive, store
from hmil_fast.columns import PARTS
from hmil_fast.config import MODELS, PRESETS, load_config, load_runtime


def add_splits(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `splits import`."""

    def run(args: argparse.Namespace) -> int:
        from hmil_fast.bags.split_import import write_import
        from hmil_fast.cli.console import notes, stderr
        from hmil_fast.training.choose_folds import tested_text

        manifest = write_import(args.files, args.format, args.out, notes(stderr()))
        print(f"{args.out}: {len(manifest.slides)} slides")
        for number, fold in enumerate(manifest.folds):
            sizes = ", ".join(f"{part} {len(getattr(fold, part))}" for part in PARTS)
            print(f"fold {number}: {sizes}")
        print(tested_text(manifest.folds, len(manifest.slides)))
        if not any(slide.patient_id for slide in manifest.slides):
            print("no patients are stated: `hmil-fast train` checks theirs against the label file")
        return 0

    text = "Turn split files of others into a manifest for `train --splits`."
    parser = add_command(commands, "splits", text, run)
    parser.add_argument("action", choices=("import",), help="import: read split files")
    parser.add_argument("files", nargs="+", type=path, metavar="FILE", help="or a folder of them")
    parser.add_argument(
        "--format",
        choices=("csv", "clam", "hmil"),
        required=True,
        help="csv: slide_id,split[,label][,patient_id], a file a fold; clam: splits_<i>.csv; "
        "hmil: {train,val,test}_splits_<i>.pkl",
    )
    parser.add_argument("--out", type=path, required=True, metavar="JSON")


def add_train(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `train`."""

    def run(args: argparse.Namespace) -> int:
        from hmil_fast.api.train import train
        from hmil_fast.bags.splits import read_labels
        from hmil_fast.cli.console import stderr
        from hmil_fast.cli.tables import print_metrics
        from hmil_fast.cli.training_bar import TrainingBar
        from hmil_fast.evaluation.evaluate import read_metrics
        from hmil_fast.labels import LabelTree
        from hmil_fast.runs.archive import set_aside
        from hmil_fast.training import distributed

        names = ("model", "preset", "folds", "epochs", "mpp", "seed", "device")
        sources = (args.config, args.settings, {name: getattr(args, name) for name in names})
        config, runtime = load_config(*sources), load_runtime(*sources)
        first = distributed.rank() == 0
        with TrainingBar(stderr(quiet=not first)) as bar:
            tree = LabelTree.from_yaml(args.tree)
            slides = read_labels(args.labels, tree, say=bar.note, leaves_only=args.leaves_only)
            if args.overwrite and first:
                set_aside(args.out)
            trained = train(
                args.store,
                slides,
                tree,
                args.out,
                config,
                splits=args.splits,
                runtime=runtime,
                report=bar.update,
            )
        if first:
            print_metrics(read_metrics(trained))
        distributed.finish()
        return 0

    text = "Train and evaluate by cross-validation; run again, it resumes."
    parser = add_command(commands, "train", text, run)
    parser.add_argument("--store", type=store, required=True, metavar="STORE")
    parser.add_argument(
        "--labels",
        type=path,
        required=True,
        metavar="CSV",
        help="slide_id,label[,patient_id][,split]",
    )
    parser.add_argument(
        "--tree",
        type=path,
        required=True,
        metavar="YAML",
        help="nested mapping whose leaves are the labels",
    )
    parser.add_argument(
        "--leaves-only",
        action="store_true",
        help="leave out slides whose label is an inner node of the tree",
    )
    parser.add_argument(
        "--splits", type=path, metavar="JSON", help="take the folds of this manifest as they are"
    )
    parser.add_argument("--out", type=path, required=True, metavar="RUN")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="train anew where RUN holds a run; that one is renamed to RUN.bak-<time>",
    )
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--folds", type=count)
    parser.add_argument("--epochs", type=count)
    parser.add_argument(
        "--mpp", type=positive, metavar="X", help="scale of a store that has several (the finest)"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device")
    parser.add_argument(
        "--config", type=path, metavar="YAML", help="settings; flags and key=value win over it"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="any setting of config.yaml"
    )
    parser.set_defaults(words="settings")
