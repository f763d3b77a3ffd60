"""What a job is to extract: slide files from the command line or a manifest, each with an id."""

import csv
import glob
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hmil_fast.errors import UsageError
from hmil_fast.io.store.location import is_url

_SUFFIXES = ".svs .tif .tiff .ndpi .mrxs .scn .bif .vms .vmu .svslide .qptiff .czi .dcm"
SLIDE_SUFFIXES = frozenset(_SUFFIXES.split())
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


def collect_slides(
    inputs: Sequence[str],
    manifest: Path | None = None,
    slide_mpp: float | None = None,
    reader: str | None = None,
    glass: tuple[int, int, int] | None = None,
) -> list[SlideTask]:
    """Slides of files, folders (searched through), globs and a manifest, in a fixed order.

    Args:
        inputs: Files, folders or glob patterns.
        manifest: CSV with columns path[,slide_id][,mpp]; paths are relative to its folder.
        slide_mpp: Level-0 µm/px of slides that state none, or an implausible one.
        reader: Of all of them.
        glass: Of all of them.

    Raises:
        UsageError: Nothing found, an unreadable manifest, or two slides with one id.
    """
    tasks = [task for text in inputs for task in _from_input(text, slide_mpp)]
    if manifest is not None:
        tasks += _from_manifest(manifest, slide_mpp)
    tasks = [replace(task, reader=reader, glass=glass) for task in dict.fromkeys(tasks)]
    if not tasks:
        raise UsageError(
            f"no slide found in {', '.join(inputs) or manifest or 'an empty command line'}",
            f"name slide files, or folders that hold some of {' '.join(sorted(SLIDE_SUFFIXES))}",
        )
    seen: dict[str, Path] = {}
    for task in tasks:
        if task.slide_id in seen:
            raise UsageError(
                f"two slides have the id {task.slide_id!r}: {seen[task.slide_id]} and {task.path}",
                "name them apart in a manifest with columns path,slide_id",
            )
        seen[task.slide_id] = task.path
    return tasks


def _from_input(text: str, mpp: float | None) -> list[SlideTask]:
    if is_url(text):
        raise UsageError(f"{text!r} is a URL", _NO_URLS)
    path = Path(text)
    if path.is_dir():
        files = _slide_files(path.rglob("*"))
        return [SlideTask(_slide_id(file.relative_to(path)), file, None, mpp) for file in files]
    if path.exists() or not glob.has_magic(text):
        return [
            SlideTask(path.stem, path, None, mpp)
        ]  # a missing file fails by itself, not the job
    found = [Path(name) for name in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207
    return [SlideTask(file.stem, file, None, mpp) for file in found if file.is_file()]


def _slide_files(paths: Iterable[Path]) -> list[Path]:
    """The slide files among paths, sorted; the largest stands for a folder of DICOM files."""
    files: list[Path] = []
    series: dict[Path, Path] = {}
    for path in sorted(paths):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix.lower() == ".dcm":
            best = series.get(path.parent)
            if best is None or path.stat().st_size > best.stat().st_size:
                series[path.parent] = path
        elif path.suffix.lower() in SLIDE_SUFFIXES:
            files.append(path)
    return sorted([*files, *series.values()])


def _slide_id(relative: Path) -> str:
    dicom = relative.suffix.lower() == ".dcm" and len(relative.parts) > 1
    if relative.is_absolute():  # only a manifest has such
        return relative.parent.name if dicom else relative.stem
    if dicom:
        return relative.parent.as_posix()
    return relative.with_suffix("").as_posix()


def _from_manifest(manifest: Path, slide_mpp: float | None) -> list[SlideTask]:
    try:
        text = manifest.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read the manifest {manifest}: {error}", "give a CSV file in UTF-8"
        ) from None
    rows = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    try:
        return _manifest_tasks(manifest, rows, slide_mpp)
    except csv.Error as error:
        raise UsageError(
            f"{manifest} line {rows.line_num}: {error}", "save it again as plain CSV"
        ) from None


def _manifest_tasks(
    manifest: Path, rows: "csv.DictReader[str]", slide_mpp: float | None
) -> list[SlideTask]:
    if rows.fieldnames is None or "path" not in rows.fieldnames:
        raise UsageError(
            f"the manifest {manifest} has no column `path` (columns: {rows.fieldnames})",
            "give it a first line path[,slide_id][,mpp]",
        )
    tasks = []
    for row in rows:
        line = rows.line_num
        extra: Any = row.get(None)  # where DictReader puts them
        if extra:
            raise UsageError(
                f"{manifest} line {line} has more fields than the first line: {','.join(extra)!r}",
                'put a value that holds a comma in "quotes", and write 0.5 for 0,5',
            )
        if not (row["path"] or "").strip():
            raise UsageError(f"{manifest} line {line} has no path", "fill it in, or drop the line")
        if is_url(row["path"].strip()):
            raise UsageError(f"{manifest} line {line}: {row['path'].strip()!r} is a URL", _NO_URLS)
        path = manifest.parent / row["path"].strip()
        mpp: float | None = None
        stated = (row.get("mpp") or "").strip()
        if stated:
            try:
                mpp = float(stated)
            except ValueError:
                mpp = math.nan
            if not (math.isfinite(mpp) and mpp > 0):
                raise UsageError(
                    f"{manifest} line {line}: mpp is {stated!r}",
                    "give µm per pixel of level 0, such as 0.25, or leave it empty",
                )
        slide_id = (row.get("slide_id") or "").strip() or _slide_id(Path(row["path"].strip()))
        tasks.append(SlideTask(slide_id, path, mpp, slide_mpp))
    return tasks
