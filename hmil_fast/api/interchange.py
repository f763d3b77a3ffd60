"""Import features of other tools into a store, and export them from one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

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
from hmil_fast.io.store.location import Location, location
from hmil_fast.tables import Say, quiet, read_table

_Work = Sequence[tuple[str, Callable[[], Taken]]]
# shows the progress of a loop over slides
Track = Callable[[_Work], Iterable[tuple[str, Callable[[], Taken]]]]


def untracked(work: _Work) -> _Work:
    """Show no progress."""
    return work


@dataclass(frozen=True)
class Transfer:
    """What an import or export has done.

    Attributes:
        slides: Slides in all.
        before: Slides that were done before.
        tiles: Tiles of the slides that were done now.
        failed: Slides that failed, each with its error.
        notes: Slides by note.
        target: The store, or the folder.
        left_out: What of the store was not exported.
    """

    slides: int
    before: int
    tiles: int
    failed: Sequence[tuple[str, HmilError]]
    notes: Mapping[str, Sequence[str]]
    target: Location
    left_out: Sequence[str] = ()


def import_features(
    source: Path | str,
    store: Location | str,
    format: str,  # noqa: A002
    hints: Hints = Hints(),
    *,
    manifest: Path | None = None,
    slide_mpp: float | None = None,
    say: Say = quiet,
    track: Track = untracked,
) -> Transfer:
    """Import files of features into a store, which is made if it does not exist; it resumes.

    Args:
        source: A file, or a folder of them.
        store: Folder or URL of the store.
        format: A key of `hmil_fast.io.interchange.FORMATS`.
        hints: What the files do not state: coordinates, encoder, dtype.
        manifest: Level-0 resolutions as a table slide_id,mpp.
        slide_mpp: Level-0 resolution of the other slides, in µm/px.
        say: Called with each note.
        track: Shows progress.

    Raises:
        UsageError: No file to import, or no slide in them that has tiles.
        SlideError: A new store is to be made, and no file can be read.
        StoreError: The store cannot be made or opened.
    """
    form = FORMATS[format]
    files = find_files(form, Path(source))
    mpp = _resolutions(manifest, slide_mpp, [slide_id for slide_id, _ in files], say)
    hints = replace(hints, mpp=mpp)
    path = location(store)
    backend = backend_of(path)
    backend.check(path, writing=True)
    if backend.exists(path / STORE_FILE):
        opened = open_store(path)
    else:
        opened = create_store(path, likely_spec(files, form, hints))
    work = [
        (slide_id, partial(import_file, opened, form, slide_id, file, hints))
        for slide_id, file in files
    ]
    return _transfer(work, opened.path, track)


def export_features(
    store: Location | str,
    target: Path | str,
    format: str,  # noqa: A002
    *,
    mpp: float | None = None,
    manifest: Path | None = None,
    slide_mpp: float | None = None,
    say: Say = quiet,
    track: Track = untracked,
) -> Transfer:
    """Export all slides of a store as files of another tool; called again, it resumes.

    Args:
        store: Folder or URL of the store.
        target: Folder of the files.
        format: A key of `hmil_fast.io.interchange.FORMATS`.
        mpp: Scale in µm/px of a store that has several; by default the finest.
        manifest: Level-0 resolutions of slides that do not state theirs, a table slide_id,mpp.
        slide_mpp: Level-0 resolution of the other slides, in µm/px.
        say: Called with each note.
        track: Shows progress.

    Raises:
        StoreError: There is no store, or it holds nothing.
        UsageError: It has no such scale.
    """
    form = FORMATS[format]
    whole = open_store(store)
    opened = at_scale(whole, mpp)
    slides = [*whole.slide_ids(), *sorted(whole.unnamed)]  # the latter fail, and are named
    if not slides:
        raise StoreError(f"the store {opened.path} is empty", "extract or import slides first")
    hints, folder = Hints(mpp=_resolutions(manifest, slide_mpp, slides, say)), Path(target)
    work = [
        (slide_id, partial(export_slide, opened, form, slide_id, folder, hints.mpp_of(slide_id)))
        for slide_id in slides
    ]
    done = _transfer(work, folder, track)
    left = []
    if len(whole.spec.scales) > 1:
        at = "unknown" if opened.spec.scales[0] is None else f"{opened.spec.scales[0]:g}"
        left.append(f"the scale at {at} µm per px was exported, --mpp takes another")
    if whole.spec.views:
        left.append(f"the {whole.spec.views} augmented views of every tile are not exported")
    return replace(done, left_out=left)


def _transfer(work: _Work, target: Location, track: Track) -> Transfer:
    """Import or export one slide after the other; a slide that fails stops no other."""
    before, tiles, failed = 0, 0, list[tuple[str, HmilError]]()
    notes: dict[str, list[str]] = {}
    for slide_id, one in track(work):
        try:
            taken = one()
        except (SlideError, StoreError) as error:
            failed.append((slide_id, error))
        except OSError as error:
            fix = "check the disks of source and target, then run the same command again"
            failed.append((slide_id, SlideError(str(error), fix)))
        else:
            before += taken.before
            tiles += 0 if taken.before else taken.tiles
            for note in taken.notes:
                notes.setdefault(note, []).append(slide_id)
    return Transfer(len(work), before, tiles, failed, notes, target)


def _resolutions(
    manifest: Path | None, slide_mpp: float | None, slide_ids: Sequence[str], say: Say
) -> dict[str, float]:
    """Read level-0 µm/px by slide id from a table slide_id,mpp; `slide_mpp` is under ""."""
    mpp: dict[str, float] = {} if slide_mpp is None else {"": slide_mpp}
    if manifest is None:
        return mpp
    table = read_table(manifest, ("slide_id", "mpp"), say)
    stated = {}
    for line, row in table.rows:
        where, name = f"{manifest} line {line}", table.cell(row, "slide_id")
        if not name:
            raise UsageError(f"{where}: slide_id is empty", "give columns slide_id,mpp")
        stated[name] = as_mpp(table.cell(row, "mpp"), where)
    names = match_slides(stated, slide_ids)
    if left := [name for name in stated if name not in names]:
        say(f"{manifest}: {len(left)} lines name none of the slides, such as {left[0]!r}")
    return mpp | {slide_id: stated[name] for name, slide_id in names.items()}
