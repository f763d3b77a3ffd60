"""`hmil-fast store`: what a store holds, whether it is sound, what stopped jobs left in it."""

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.progress import track

from hmil_fast.errors import StoreError, UsageError
from hmil_fast.extraction.jobs.leases import outlived
from hmil_fast.io.store import FeatureStore, Finding
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.restore import open_by_slides, restore
from hmil_fast.io.store.sweep import sweep as sweep_store

FEW = 3  # damaged slides that repair drops without --yes


def info(args: argparse.Namespace) -> int:
    """Print what the store holds, as JSON: what all slides share, then tiles and mpp of each.

    Exit code 1 where something is damaged or cannot be read; `problems` says what.
    """
    store, sound = _open(args)
    about = store.info()
    slides: dict[str, dict[str, Any]] = {}
    for slide_id, record in store.records().items():
        if isinstance(record, StoreError):
            sound = False
            continue
        mpp = record.attrs.get("mpp", {})
        counts = [record.num_tiles, *(scale.num_tiles for scale in record.scales)]
        slides[slide_id] = {"tiles": sum(counts), "mpp": mpp.get("level0")}
        slides[slide_id]["bad_tiles"] = record.attrs.get("bad_tiles")  # of imported ones unknown
        if record.scales:
            slides[slide_id]["scales"] = [
                {"mpp": at, "tiles": n} for at, n in zip(store.spec.scales, counts, strict=True)
            ]
    print(json.dumps({**about, "slide_ids": slides}, indent=1))
    return 0 if sound else 1


def verify(args: argparse.Namespace) -> int:
    """Check every object of every slide; exit code 1 where something is damaged or unreadable."""
    store, sound = _open(args)
    out = Console(soft_wrap=True, highlight=False)
    bad, count = _look(store)
    for finding in bad:
        out.print(f"{finding.slide_id}: {finding.problem}\n  Fix: {finding.fix}", markup=False)
    damaged = sum(finding.damaged for finding in bad)
    other = f", {len(bad) - damaged} with other problems" if len(bad) > damaged else ""
    out.print(f"{count} slides checked, {damaged} damaged{other}")
    return 0 if sound and not bad else 1


def repair(args: argparse.Namespace) -> int:
    """Restore store.json, and set damaged slides aside, so that `extract` makes them anew.

    A slide is dropped only if two looks found its bytes missing or wrong.
    """
    store, problem = open_by_slides(args.store)
    out = Console(soft_wrap=True, highlight=False)
    if problem:
        restore(store)
        out.print(f"{problem}. Restored from what the slides say", markup=False)
    bad, count = _look(store)
    left = [finding for finding in bad if not finding.damaged]
    for finding in left:
        out.print(f"{finding.slide_id}: left as it is: {finding.problem}", markup=False)
        out.print(f"  Fix: {finding.fix}", markup=False)
    damaged = [finding for finding in bad if finding.damaged]
    if len(damaged) > FEW and not args.yes:
        for finding in damaged:
            out.print(f"{finding.slide_id}: would be dropped: {finding.problem}", markup=False)
        out.print(
            f"{len(damaged)} of {count} slides are damaged, none was dropped: look at the disk and "
            "the backups first, then run this again with --yes"
        )
        return 1
    dropped = 0
    for finding in damaged:
        again = next(store.verify([finding.slide_id]))
        if not again.damaged:
            left += [] if again.ok else [again]
            now = again.problem or "the second look found nothing wrong"
            out.print(f"{finding.slide_id}: left as it is: {now}", markup=False)
            continue
        try:
            store.set_aside(finding.slide_id)
        except StoreError as error:
            left.append(finding)
            out.print(f"{finding.slide_id}: left as it is: {error}", markup=False)
            continue
        dropped += 1
        out.print(f"{finding.slide_id}: dropped; extract it again", markup=False)
    kept = "; their files stay until `hmil-fast store sweep`" if dropped else ""
    out.print(f"{dropped} damaged slides dropped{kept}", markup=False)
    return 1 if left else 0


def _open(args: argparse.Namespace) -> tuple[FeatureStore, bool]:
    """The store, and whether its store.json is sound; else it is said."""
    store, problem = open_by_slides(args.store)
    if problem:
        fix = f"Run `hmil-fast store repair {store.path}`, which restores it from the slides."
        sys.stderr.write(f"{problem}\nFix: {fix}\n")
    return store, not problem


def _look(store: FeatureStore) -> tuple[list[Finding], int]:
    """Verify all slides: those that are not sound, and how many there are."""
    bad, count = [], 0
    for finding in track(
        store.verify(),
        "verifying",
        total=len(store.slide_ids()) + len(store.unnamed),
        console=Console(stderr=True),
        transient=True,
    ):
        count += 1
        if not finding.ok:
            bad.append(finding)
    return bad, count


def drop(args: argparse.Namespace) -> int:
    """Drop the slides that are named."""
    store, _ = _open(args)
    if not args.slides:
        raise UsageError("no slide to drop was named", "name slide ids behind the store")
    unknown = sorted(set(args.slides).difference(store.slide_ids(), store.unnamed))
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
    out, (store, _) = Console(soft_wrap=True, highlight=False), _open(args)
    found, younger = sweep_store(store.path, args.older_than * 3600, delete=args.delete)
    leases = outlived(store.path, store.slide_ids(), args.older_than * 3600)
    for path in leases if args.delete else ():
        backend_of(path).unlink(path)
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
