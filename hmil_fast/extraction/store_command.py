"""`hmil-fast store`: what a store holds, whether it is sound, what stopped jobs left in it."""

import argparse
import json
from typing import Any

from rich.console import Console
from rich.progress import track

from hmil_fast.errors import UsageError
from hmil_fast.extraction.leases import outlived
from hmil_fast.io.store import files, open_store
from hmil_fast.io.store.sweep import sweep as sweep_store


def info(args: argparse.Namespace) -> int:
    """Print what the store holds, as JSON: what all slides share, then tiles and mpp of each."""
    store = open_store(args.store)
    about = store.info()
    slides: dict[str, dict[str, Any]] = {}
    for slide_id in store.slide_ids():
        record = store.record(slide_id)
        mpp = record.attrs.get("mpp", {})
        counts = [record.num_tiles, *(scale.num_tiles for scale in record.scales)]
        slides[slide_id] = {"tiles": sum(counts), "mpp": mpp.get("level0")}
        slides[slide_id]["bad_tiles"] = record.attrs.get("bad_tiles")  # of imported ones unknown
        if record.scales:
            slides[slide_id]["scales"] = [
                {"mpp": at, "tiles": n} for at, n in zip(store.spec.scales, counts, strict=True)
            ]
    print(json.dumps({**about, "slide_ids": slides}, indent=1))
    return 0


def verify(args: argparse.Namespace) -> int:
    """Check every object of every slide; exit code 1 where one is damaged."""
    store = open_store(args.store)
    out, err = Console(soft_wrap=True, highlight=False), Console(stderr=True)
    count = len(store.slide_ids())
    bad = 0
    for finding in track(store.verify(), "verifying", total=count, console=err, transient=True):
        if not finding.ok:
            bad += 1
            out.print(f"{finding.slide_id}: {finding.problem}\n  Fix: {finding.fix}", markup=False)
    out.print(f"{count} slides checked, {bad} damaged")
    return 1 if bad else 0


def repair(args: argparse.Namespace) -> int:
    """Drop damaged slides, so that `extract` makes them anew."""
    store, out = open_store(args.store), Console(soft_wrap=True, highlight=False)
    damaged = [finding.slide_id for finding in store.verify() if not finding.ok]
    for slide_id in damaged:
        store.drop(slide_id)
        out.print(f"{slide_id}: dropped; extract it again", markup=False)
    out.print(f"{len(damaged)} damaged slides dropped")
    return 0


def drop(args: argparse.Namespace) -> int:
    """Drop the slides that are named."""
    store = open_store(args.store)
    if not args.slides:
        raise UsageError("no slide to drop was named", "name slide ids behind the store")
    unknown = sorted(set(args.slides) - set(store.slide_ids()))
    if unknown:
        raise UsageError(
            f"the store {store.path} has no slide {unknown[0]!r}",
            "see the ids with `hmil-fast store info`",
        )
    for slide_id in args.slides:
        store.drop(slide_id)
        print(f"{slide_id}: dropped")
    return 0


def sweep(args: argparse.Namespace) -> int:
    """List, or delete, attempts that no commit names, and leases on slides that are done."""
    out, store = Console(soft_wrap=True, highlight=False), open_store(args.store)
    found, younger = sweep_store(store.path, args.older_than * 3600, delete=args.delete)
    leases = outlived(store.path, store.slide_ids(), args.older_than * 3600)
    for path in leases if args.delete else ():
        files.unlink(path)
    for path in found + leases:
        out.print(str(path), markup=False)
    hint = "; delete them with --delete" if found + leases and not args.delete else ""
    out.print(f"{len(found)} abandoned attempts, {len(leases)} abandoned leases{hint}")
    if younger:
        out.print(
            f"not counted: {younger} attempts younger than {args.older_than:g} h, on which jobs "
            "may be at work (see --older-than)"
        )
    return 0
