"""The commands over a feature store, as `hmil_fast.cli.main` shows them."""

import argparse

from hmil_fast.cli.options import Command, Commands, add_command, path, positive, store

_EXPORTED = ("trident", "clam", "stamp", "atlaspatch", "npy", "pt")
_IMPORTED = (*_EXPORTED, "slide2vec")


def add_store(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `store` and its actions."""
    parser = commands.add_parser(
        "store", help="Look after a feature store.", description="Look after a feature store."
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def look_after(name: str, text: str) -> argparse.ArgumentParser:
        def run(args: argparse.Namespace) -> int:
            from hmil_fast.api import store as api_store

            return int(getattr(api_store, name)(args))

        action = add_command(actions, name, text, run)
        action.add_argument("store", type=store, metavar="STORE")
        return action

    look_after("info", "What it holds, as JSON.")
    look_after("verify", "Check every checksum.")
    text = (
        "Restore a damaged store.json, and drop damaged slides so that `extract` makes them anew."
    )
    repair = look_after("repair", text)
    repair.add_argument(
        "--yes", action="store_true", help="also where more than three slides are damaged"
    )
    drop = look_after("drop", "Drop slides by id.")
    drop.add_argument("slides", nargs="*", metavar="SLIDE_ID")
    drop.set_defaults(words="slides")
    sweep = look_after("sweep", "List what stopped jobs left behind.")
    sweep.add_argument("--delete", action="store_true", help="delete it")
    sweep.add_argument(
        "--older-than",
        type=float,
        default=24.0,
        metavar="HOURS",
        help="age of what no job works on any more (24)",
    )
    _add_interchange(actions)


def _add_interchange(actions: "Commands[argparse.ArgumentParser]") -> None:
    def command(name: str) -> Command:
        def run(args: argparse.Namespace) -> int:
            from hmil_fast.api import interchange

            return int(getattr(interchange, name)(args))

        return run

    text = "Import features of other tools; run again, it resumes."
    take = add_command(actions, "import", text, command("import_features"))
    take.add_argument("source", type=path, metavar="SOURCE", help="a file, or a folder of them")
    take.add_argument("store", type=store, metavar="STORE", help="made if there is none")
    take.add_argument(
        "--coords",
        type=path,
        metavar="DIR",
        help="TRIDENT's or CLAM's folder `patches`, for clam, npy and pt; slide2vec's `tiles`",
    )
    take.add_argument(
        "--encoder",
        metavar="NAME",
        help="the encoder, where the files name none, or several (atlaspatch)",
    )
    take.add_argument(
        "--dtype", choices=("float16", "float32"), help="convert the features (as they are)"
    )
    text = "Export all slides as files of another tool; run again, it resumes."
    put = add_command(actions, "export", text, command("export_features"))
    put.add_argument("store", type=store, metavar="STORE")
    put.add_argument("target", type=path, metavar="FOLDER")
    put.add_argument(
        "--mpp", type=positive, metavar="X", help="scale of a store that has several (the finest)"
    )
    for action, formats in ((take, _IMPORTED), (put, _EXPORTED)):
        action.add_argument("--format", choices=formats, required=True)
        action.add_argument(
            "--slide-mpp", type=positive, metavar="X", help="µm/px of level 0, for stamp"
        )
        action.add_argument(
            "--manifest", type=path, metavar="CSV", help="slide_id,mpp for slides that differ"
        )
