"""Collect the slides of a job from files, folders, globs and a manifest, each with an id."""

import glob
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hmil_fast.errors import UsageError
from hmil_fast.extraction.scan import SLIDE_SUFFIXES, dicom_slides, scan
from hmil_fast.io.store.location import is_url
from hmil_fast.tables import read_table

_NAMED = 5
_NO_URLS = "copy the slides to a disk, and give their paths"


@dataclass(frozen=True)
class SlideTask:
    """One slide of a job.

    Attributes:
        slide_id: Name of the slide in the store: its path below the folder that was given, without
            the suffix, or what the manifest says.
        path: The file; for a DICOM series the largest file of its folder.
        mpp: Level-0 resolution in µm/px by the manifest, which wins over the file, or None.
        fallback_mpp: The one to use where the file states none, or an implausible one.
        reader: The one to read it with, as `open_slide` names them; by default it chooses.
        glass: Grey levels (red, green, blue) of its glass, where the user states them.
    """

    slide_id: str
    path: Path
    mpp: float | None = None
    fallback_mpp: float | None = None
    reader: str | None = None
    glass: tuple[int, int, int] | None = None

    @property
    def file_bytes(self) -> int:
        """Size of the file; 0 if it does not exist."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0


def collect_slides(
    inputs: Sequence[str],
    manifest: Path | None = None,
    slide_mpp: float | None = None,
    reader: str | None = None,
    glass: tuple[int, int, int] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[SlideTask]:
    """Slides of files, folders (searched through), globs and a manifest, in a fixed order.

    Args:
        inputs: Files, folders or glob patterns.
        manifest: CSV with columns path[,slide_id][,mpp]; paths are relative to its folder.
        slide_mpp: Level-0 µm/px of slides that state none, or an implausible one.
        reader: Of all of them.
        glass: Of all of them.
        tell: Called with what is left out, and with what was made of ids that clash.

    Raises:
        UsageError: Nothing found, an unreadable manifest, or several slides with one id.
    """
    left_out: list[str] = []
    files: dict[Path, str] = {}
    for text in inputs:
        for path, slide_id in _from_input(text, left_out).items():
            files.setdefault(path, slide_id)
    _leave_parts(files, left_out)
    tasks = [SlideTask(slide_id, path, None, slide_mpp) for path, slide_id in files.items()]
    tasks = _apart(tasks, left_out)
    if manifest is not None:
        tasks += _from_manifest(manifest, slide_mpp, left_out.append)
    tasks = [replace(task, reader=reader, glass=glass) for task in dict.fromkeys(tasks)]
    if not tasks:
        where = ", ".join(inputs) or manifest or "an empty command line"
        raise UsageError(
            f"no slide found in {where}{''.join(f'; {text}' for text in left_out)}",
            f"name slide files, or folders that hold some of {' '.join(sorted(SLIDE_SUFFIXES))}",
        )
    _check_ids(tasks)
    alike = defaultdict[str, list[str]](list)
    for task in tasks:
        alike[unicodedata.normalize("NFC", task.slide_id).casefold()].append(task.slide_id)
    if pairs := [" and ".join(map(repr, ids)) for ids in alike.values() if len(ids) > 1]:
        left_out.append(
            f"ids of {_count(pairs)} differ only in case or in how letters are encoded, labels "
            f"must be written like them: {_some(pairs)}"
        )
    for text in left_out:
        tell(text)
    return tasks


def _leave_parts(files: dict[Path, str], said: list[str]) -> None:
    """Of DICOM files that were named one by one, take one a slide."""
    dicom = defaultdict[Path, list[Path]](list)
    for path in files:
        if path.suffix.lower() == ".dcm" and path.is_file():
            dicom[path.parent].append(path)
    parts = {
        path
        for paths in dicom.values()
        if len(paths) > 1
        for path in set(paths).difference(dicom_slides(paths)[0])
    }
    for path in parts:
        del files[path]
    if parts:
        names = _some(sorted(map(str, parts)))
        said.append(f"{len(parts):,} DICOM files are parts of slides that are taken: {names}")


def _apart(tasks: Sequence[SlideTask], said: list[str]) -> list[SlideTask]:
    """Keep the suffix in the ids of files that differ in nothing else, such as a.svs and a.tif."""
    same = defaultdict[str, set[str]](set)
    for task in tasks:
        same[task.slide_id].add(task.path.suffix)
    clashes = {slide_id: sorted(kinds) for slide_id, kinds in same.items() if len(kinds) > 1}
    if clashes:
        pairs = [f"{slide_id} ({', '.join(kinds)})" for slide_id, kinds in clashes.items()]
        said.append(
            f"{_count(pairs)} of files differ only in their suffix, which their ids keep: "
            f"{_some(pairs)}"
        )
    return [
        replace(task, slide_id=task.slide_id + task.path.suffix)
        if task.slide_id in clashes
        else task
        for task in tasks
    ]


def _check_ids(tasks: Sequence[SlideTask]) -> None:
    paths = defaultdict[str, list[Path]](list)
    for task in tasks:
        paths[task.slide_id].append(task.path)
    clashes = [
        f"the id {slide_id!r}: {' and '.join(map(str, found))}"
        for slide_id, found in paths.items()
        if len(found) > 1
    ]
    if clashes:
        raise UsageError(
            f"several slides have {_some(clashes)}",
            "name the folder above them, so that ids are paths below it; or name them apart in a "
            "manifest with columns path,slide_id",
        )


def _count(pairs: Sequence[str]) -> str:
    return f"{len(pairs):,} group{'s' * (len(pairs) > 1)}"


def _some(texts: Sequence[str]) -> str:
    return "; ".join(texts[:_NAMED]) + ("; …" if len(texts) > _NAMED else "")


def _from_input(text: str, left_out: list[str]) -> dict[Path, str]:
    """Slide files with their ids."""
    if is_url(text):
        raise UsageError(f"{text!r} is a URL", _NO_URLS)
    path = Path(text)
    if path.is_dir():
        found = scan(path)
        if said := str(found):
            left_out.append(said)
        return {
            file: _slide_id(file.relative_to(path), own_name=file in found.shared)
            for file in found.slides
        }
    if path.exists() or not glob.has_magic(text):
        return {path: path.stem}  # a missing file fails by itself, not the job
    names = [Path(name) for name in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207
    folders = [name for name in names if name.is_dir()]
    if folders:
        left_out.append(
            f"{len(folders):,} folder{'s' * (len(folders) > 1)} that {text} matches: only files "
            f"are taken by a pattern ({_some([str(name) for name in folders])})"
        )
    return {name: name.stem for name in names if not name.is_dir()}


def _slide_id(relative: Path, own_name: bool = False) -> str:
    """The path below the folder that was named, without the suffix; a DICOM series' folder."""
    dicom = relative.suffix.lower() == ".dcm" and len(relative.parts) > 1 and not own_name
    if relative.is_absolute():  # only a manifest has such
        return relative.parent.name if dicom else relative.stem
    if dicom:
        return relative.parent.as_posix()
    return relative.with_suffix("").as_posix()


def _from_manifest(
    manifest: Path, slide_mpp: float | None, tell: Callable[[str], None]
) -> list[SlideTask]:
    table = read_table(manifest, ("path", "slide_id", "mpp"), tell)
    if "path" not in table.columns:
        raise UsageError(
            f"{manifest} line 1: no column path (columns: {table.listed()})",
            "give it a first line path[,slide_id][,mpp]",
        )
    tasks = []
    for line, row in table.rows:
        where = f"{manifest} line {line}"
        written, slide_id, mpp = (table.cell(row, name) for name in ("path", "slide_id", "mpp"))
        if not written:
            raise UsageError(
                f"{where}: {table.name('path')} is empty", "fill it in, or drop the line"
            )
        if is_url(written):
            raise UsageError(f"{where}: {written!r} is a URL", _NO_URLS)
        path = manifest.parent / written
        if not path.exists():  # macOS writes names in another form than most disks
            other = manifest.parent / unicodedata.normalize("NFD", written)
            path = other if other.exists() else path
        stated = as_mpp(mpp, where) if mpp else None
        tasks.append(SlideTask(slide_id or _slide_id(Path(written)), path, stated, slide_mpp))
    return tasks


def as_mpp(text: str, where: str) -> float:
    """A resolution in µm/px as a table states it, with a decimal point or comma.

    Raises:
        UsageError: It is not a number above 0.
    """
    try:
        mpp = float(text.replace(",", "."))
    except ValueError:
        mpp = math.nan
    if not (math.isfinite(mpp) and mpp > 0):
        raise UsageError(
            f"{where}: mpp is {text!r}", "give µm per pixel of level 0 above 0, such as 0.25"
        )
    return mpp
