"""`hmil-fast store`: what a store holds, whether it is sound, what stopped jobs left in it."""

import argparse
import json

from rich.console import Console
from rich.progress import track

from hmil_fast.io.store import open_store


def info(args: argparse.Namespace) -> int:
    """Print what the store holds, as JSON."""
    print(json.dumps(open_store(args.store).info(), indent=1))
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


def sweep(args: argparse.Namespace) -> int:
    """List, or delete, attempts that no commit names."""
    out = Console(soft_wrap=True, highlight=False)
    found = open_store(args.store).sweep(args.older_than * 3600, delete=args.delete)
    for path in found:
        out.print(str(path), markup=False)
    if found and not args.delete:
        out.print(f"{len(found)} abandoned attempts; delete them with --delete")
    return 0
