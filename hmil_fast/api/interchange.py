"""`hmil-fast store import` and `export`: features of other tools into a store, and out of one."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from hmil_fast.bags.match_names import match_slides
from hmil_fast.errors import HmilError, SlideError, StoreError, UsageError
from hmil_fast.extraction.slides import as_mpp
from hmil_fast.io.interchange import (
    FORMATS,
    Hints,
    Taken,
    export_slide,
    find_files,
    import_file,
    likely_spec,
)
from hmil_fast.io.store import at_scale, create_store, open_store
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.layout import STORE_FILE
from hmil_fast.tables import read_table


def import_features(args: argparse.Namespace) -> int:
    """Import files of features into a store, which is made if there is none; run again, it resumes.

    Raises:
        UsageError: No file to import, or no slide in them that has tiles.
        SlideError: A new store is to be made, and no file can be read.
        StoreError: The store cannot be made or opened.
    """
    form = FORMATS[args.format]
    sources = find_files(form, args.source)
    mpp = _resolutions(args, [slide_id for slide_id, _ in sources])
    hints = Hints(args.coords, args.encoder, mpp, args.dtype)
    backend_of(args.store).check(args.store, writing=True)
    if backend_of(args.store).exists(args.store / STORE_FILE):
        store = open_store(args.store)
    else:
        store = create_store(args.store, likely_spec(sources, form, hints))
    work = [
        (
            slide_id,
            lambda slide_id=slide_id, path=path: import_file(store, form, slide_id, path, hints),
        )
        for slide_id, path in sources
    ]
    return _each(work, "imported", f"Store: {store.path}")


def export_features(args: argparse.Namespace) -> int:
    """Export all slides of a store as files of another tool; run again, it resumes.

    Raises:
        StoreError: There is no store, or it holds nothing.
        UsageError: It has no such scale.
    """
    form = FORMATS[args.format]
    whole = open_store(args.store)
    store = at_scale(whole, args.mpp)
    slides = [*whole.slide_ids(), *sorted(whole.unnamed)]  # the latter fail, and are named
    if not slides:
        raise StoreError(f"the store {store.path} is empty", "Extract or import slides first.")
    hints = Hints(mpp=_resolutions(args, slides))
    work = [
        (
            slide_id,
            lambda slide_id=slide_id: export_slide(
                store, form, slide_id, args.target, hints.mpp_of(slide_id)
            ),
        )
        for slide_id in slides
    ]
    code = _each(work, "exported", f"Folder: {args.target}")
    left = []
    if len(whole.spec.scales) > 1:
        at = "unknown" if store.spec.scales[0] is None else f"{store.spec.scales[0]:g}"
        left.append(f"the scale at {at} µm per px was exported, --mpp takes another")
    if whole.spec.views:
        left.append(f"the {whole.spec.views} augmented views of every tile are not exported")
    if left:
        print("; ".join(left))
    return code


def _each(work: Sequence[tuple[str, Callable[[], Taken]]], done: str, where: str) -> int:
    """Do one slide after the other; one that fails stops no other."""
    err, out = Console(stderr=True), Console(soft_wrap=True, highlight=False)
    before, tiles, failed = 0, 0, list[tuple[str, HmilError]]()
    notes: dict[str, list[str]] = {}
    for slide_id, task in track(work, done, console=err, transient=True):
        try:
            taken = task()
        except (SlideError, StoreError) as error:
            failed.append((slide_id, error))
        except OSError as error:
            failed.append((slide_id, SlideError(str(error), "Mend that, then run this again.")))
        else:
            before += taken.before
            tiles += 0 if taken.before else taken.tiles
            for note in taken.notes:
                notes.setdefault(note, []).append(slide_id)
    for note, slides in notes.items():
        names = slides[0] if len(slides) == 1 else f"{len(slides)} slides, {slides[0]} the first"
        err.print(f"[yellow]{escape(names)}: {escape(note)}", highlight=False, soft_wrap=True)
    out.print(
        f"{len(work) - before - len(failed)} slides {done} ({tiles:,} tiles), {before} were done "
        f"before, {len(failed)} failed. {where}",
        markup=False,
    )
    for slide_id, problem in failed:
        out.print(f"  {slide_id}: {problem.what}\n    Fix: {problem.fix}", markup=False)
    return 1 if failed else 0


def _resolutions(args: argparse.Namespace, slide_ids: Sequence[str]) -> dict[str, float]:
    """Level-0 µm/px by slide id from --manifest, and under "" from --slide-mpp."""
    found: dict[str, float] = {} if args.slide_mpp is None else {"": args.slide_mpp}
    path: Path | None = args.manifest
    if path is None:
        return found

    def say(line: str) -> None:
        print(f"note: {line}", file=sys.stderr)

    table = read_table(path, ("slide_id", "mpp"), say)
    stated = {}
    for line, row in table.rows:
        where, name = f"{path} line {line}", table.cell(row, "slide_id")
        if not name:
            raise UsageError(f"{where}: slide_id is empty", "give columns slide_id,mpp")
        stated[name] = as_mpp(table.cell(row, "mpp"), where)
    names = match_slides(stated, slide_ids)
    if left := [name for name in stated if name not in names]:
        say(f"{path}: {len(left)} lines name none of the slides, such as {left[0]!r}")
    return found | {slide_id: stated[name] for name, slide_id in names.items()}
