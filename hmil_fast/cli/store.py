"""The commands over a feature store: `store info`, `verify`, `repair`, `import` and others."""

import argparse
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from hmil_fast.cli.options import Command, Commands, add_command, path, positive, store

if TYPE_CHECKING:
    from hmil_fast.api.interchange import Transfer
    from hmil_fast.io.store import FeatureStore

_EXPORTED = ("trident", "clam", "stamp", "atlaspatch", "npy", "pt")
_IMPORTED = (*_EXPORTED, "slide2vec")
T = TypeVar("T")


def add_store(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `store` and its actions."""
    text = "Inspect, verify and repair a feature store; import and export features."
    parser = commands.add_parser("store", help=text, description=text)
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def add_action(name: str, text: str, run: Command) -> argparse.ArgumentParser:
        action = add_command(actions, name, text, run)
        action.add_argument("store", type=store, metavar="STORE")
        return action

    add_action("info", "Print what the store holds as JSON.", _info)
    add_action("verify", "Check every checksum.", _verify)
    text = "Restore a damaged store.json; drop damaged slides so that `extract` makes them again."
    repair = add_action("repair", text, _repair)
    repair.add_argument(
        "--yes", action="store_true", help="drop damaged slides even if they are more than three"
    )
    drop = add_action("drop", "Drop slides by id.", _drop)
    drop.add_argument("slides", nargs="*", metavar="SLIDE_ID")
    drop.set_defaults(words="slides")
    sweep = add_action("sweep", "List what stopped jobs left behind.", _sweep)
    sweep.add_argument("--delete", action="store_true", help="delete it")
    sweep.add_argument(
        "--older-than",
        type=float,
        default=24.0,
        metavar="HOURS",
        help="minimum idle time in hours (default: 24)",
    )
    _add_interchange(actions)


def _open(args: argparse.Namespace) -> "tuple[FeatureStore, bool]":
    """Open the store; print what is wrong with its store.json, and return whether it is sound."""
    from hmil_fast.api.store import open_damaged

    opened, problem = open_damaged(args.store)
    if problem:
        fix = f"run `hmil-fast store repair {opened.path}`, which restores it from the slides"
        sys.stderr.write(f"{problem}\nFix: {fix}\n")
    return opened, not problem


def _track(items: Iterable[T], count: int | None = None, text: str = "verifying") -> Iterable[T]:
    from rich.console import Console
    from rich.progress import track

    err = Console(stderr=True)
    return track(items, text, count, console=err, transient=True, disable=not err.is_terminal)


def _info(args: argparse.Namespace) -> int:
    from hmil_fast.api.store import describe

    opened, sound = _open(args)
    about, readable = describe(opened)
    print(json.dumps(about, indent=1))
    return 0 if sound and readable else 1


def _verify(args: argparse.Namespace) -> int:
    from hmil_fast.api.store import verify

    opened, sound = _open(args)
    bad, count = verify(opened, _track)
    for finding in bad:
        print(f"{finding.slide_id}: {finding.problem}\n  Fix: {finding.fix}")
    damaged = sum(finding.damaged for finding in bad)
    other = f", {len(bad) - damaged} with other problems" if len(bad) > damaged else ""
    print(f"{count} slides checked, {damaged} damaged{other}")
    return 0 if sound and not bad else 1


def _repair(args: argparse.Namespace) -> int:
    from hmil_fast.api.store import repair

    done = repair(args.store, many=args.yes, track=_track)
    if done.restored:
        print(f"{done.restored}. Restored from what the slides say")
    for slide_id, problem, fix in done.left:
        print(f"{slide_id}: left as it is: {problem}\n  Fix: {fix}")
    if done.refused:
        for finding in done.refused:
            print(f"{finding.slide_id}: would be dropped: {finding.problem}")
        print(
            f"{len(done.refused)} of {done.checked} slides are damaged, none was dropped: look at "
            "the disk and the backups first, then run this again with --yes"
        )
        return 1
    for slide_id in done.dropped:
        print(f"{slide_id}: dropped; extract it again")
    kept = "; their files stay until `hmil-fast store sweep`" if done.dropped else ""
    print(f"{len(done.dropped)} damaged slides dropped{kept}")
    return 1 if done.left else 0


def _drop(args: argparse.Namespace) -> int:
    from hmil_fast.api.store import drop

    opened, _ = _open(args)
    for slide_id in drop(opened, args.slides):
        print(f"{slide_id}: dropped")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from hmil_fast.api.store import sweep

    opened, _ = _open(args)
    swept = sweep(opened, args.older_than, delete=args.delete)
    left = [*swept.attempts, *swept.leases]
    for place in left:
        print(place)
    hint = "; delete them with --delete" if left and not args.delete else ""
    print(f"{len(swept.attempts)} abandoned attempts, {len(swept.leases)} abandoned leases{hint}")
    if swept.younger:
        print(
            f"not counted: {swept.younger} attempts younger than {args.older_than:g} h, on which "
            "jobs may be at work (see --older-than)"
        )
    return 0


def _add_interchange(actions: "Commands[argparse.ArgumentParser]") -> None:
    def take_in(args: argparse.Namespace) -> int:
        from hmil_fast.api.interchange import import_features
        from hmil_fast.cli.console import notes, stderr
        from hmil_fast.io.interchange import Hints

        done = import_features(
            args.source,
            args.store,
            args.format,
            Hints(args.coords, args.encoder, dtype=args.dtype),
            manifest=args.manifest,
            slide_mpp=args.slide_mpp,
            say=notes(stderr()),
            track=lambda work: _track(work, text="importing"),
        )
        return _print_transfer(done, "imported", f"Store: {done.target}")

    def put_out(args: argparse.Namespace) -> int:
        from hmil_fast.api.interchange import export_features
        from hmil_fast.cli.console import notes, stderr

        done = export_features(
            args.store,
            args.target,
            args.format,
            mpp=args.mpp,
            manifest=args.manifest,
            slide_mpp=args.slide_mpp,
            say=notes(stderr()),
            track=lambda work: _track(work, text="exporting"),
        )
        return _print_transfer(done, "exported", f"Folder: {done.target}")

    text = "Import features of other tools; run again, it resumes."
    take = add_command(actions, "import", text, take_in)
    take.add_argument(
        "source", type=path, metavar="SOURCE", help="file of features, or a folder of them"
    )
    take.add_argument(
        "store", type=store, metavar="STORE", help="store to import into, made if it does not exist"
    )
    take.add_argument(
        "--coords",
        type=path,
        metavar="DIR",
        help="folder of the coordinates: `patches` of TRIDENT or CLAM, for clam, npy and pt; "
        "`tiles` of slide2vec",
    )
    take.add_argument(
        "--encoder",
        metavar="NAME",
        help="encoder, if the files name none, or several (atlaspatch)",
    )
    take.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        help="dtype of the features (default: theirs)",
    )
    text = "Export all slides as files of another tool; run again, it resumes."
    put = add_command(actions, "export", text, put_out)
    put.add_argument("store", type=store, metavar="STORE")
    put.add_argument("target", type=path, metavar="FOLDER")
    put.add_argument(
        "--mpp", type=positive, metavar="X", help="scale to export, in µm/px (default: the finest)"
    )
    for action, formats in ((take, _IMPORTED), (put, _EXPORTED)):
        action.add_argument("--format", choices=formats, required=True)
        action.add_argument(
            "--slide-mpp", type=positive, metavar="X", help="µm/px of level 0, for stamp"
        )
        action.add_argument(
            "--manifest",
            type=path,
            metavar="CSV",
            help="µm/px of slides that differ: slide_id,mpp",
        )


def _print_transfer(done: "Transfer", verb: str, where: str) -> int:
    for note, slides in done.notes.items():
        names = slides[0] if len(slides) == 1 else f"{len(slides)} slides, {slides[0]} the first"
        sys.stderr.write(f"{names}: {note}\n")
    new = done.slides - done.before - len(done.failed)
    print(
        f"{new} slides {verb} ({done.tiles:,} tiles), {done.before} were done before, "
        f"{len(done.failed)} failed. {where}"
    )
    for slide_id, problem in done.failed:
        print(f"  {slide_id}: {problem.what}\n    Fix: {problem.fix}")
    if done.left_out:
        print("; ".join(done.left_out))
    return 1 if done.failed else 0
