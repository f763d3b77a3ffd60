"""Scan a folder for slide files, and count all other files by the reason they are left out."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_SUFFIXES = ".svs .tif .tiff .ndpi .mrxs .scn .bif .vms .vmu .svslide .qptiff .czi .dcm"
SLIDE_SUFFIXES = frozenset(_SUFFIXES.split())
_NAMED = 3
_IMAGE_TYPE, _SERIES_UID = 0x0008_0008, 0x0020_000E  # DICOM tags


@dataclass
class Scan:
    """What a folder holds.

    Attributes:
        slides: Slide files, sorted; the largest image stands for a DICOM series.
        shared: Those of DICOM folders that hold several series.
        others: Other paths by why they are not taken, with {s} for the plural.
    """

    folder: Path
    slides: list[Path] = field(default_factory=list)
    shared: set[Path] = field(default_factory=set)
    others: defaultdict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    def __str__(self) -> str:
        """What is not taken, in a sentence; "" where all is."""
        parts = []
        for why, paths in self.others.items():
            kinds = Counter(path.suffix.lower() or "no suffix" for path in paths)
            names = [str(path.relative_to(self.folder)) for path in sorted(paths)]
            if "another kind" in why:
                names = [f"{count:,} {kind}" for kind, count in kinds.most_common()]
            more = ", …" if len(names) > _NAMED else ""
            what = why.format(s="s" * (len(paths) > 1))
            parts.append(f"{len(paths):,} {what} ({', '.join(names[:_NAMED])}{more})")
        return f"not taken from {self.folder}: {'; '.join(parts)}" if parts else ""


def scan(folder: Path) -> Scan:
    """Search a folder and those below it; links to folders and hidden ones are not followed."""
    result, dicom = Scan(folder), defaultdict[Path, list[Path]](list)

    def unreadable(error: OSError) -> None:
        result.others["folder{s} that cannot be read"].append(Path(error.filename))

    for name, folders, files in os.walk(folder, onerror=unreadable):
        here = Path(name)
        parts_of = {Path(file).stem for file in files if file.lower().endswith(".mrxs")}
        for below in list(folders):
            path = here / below
            if path.is_symlink():
                result.others["linked folder{s}, to be named too"].append(path)
            elif below.startswith("."):
                result.others["hidden folder{s}"].append(path)
            if path.is_symlink() or below.startswith(".") or below in parts_of:
                folders.remove(below)
        for file in files:
            path = here / file
            if file.startswith("."):
                result.others["hidden file{s}"].append(path)
            elif path.suffix.lower() not in SLIDE_SUFFIXES:
                result.others["file{s} of another kind"].append(path)
            elif not path.is_file():
                dead = path.is_symlink() and not path.exists()
                result.others["dead link{s}" if dead else "pipe{s} or socket{s}"].append(path)
            elif path.suffix.lower() == ".dcm":
                dicom[here].append(path)
            else:
                result.slides.append(path)
    for paths in dicom.values():
        slides, others = dicom_slides(paths)
        result.slides += slides
        result.shared |= set(slides) if len(slides) > 1 else set()
        for why, left in others.items():
            result.others[why] += left
    result.slides.sort()
    return result


def dicom_slides(paths: Iterable[Path]) -> tuple[list[Path], dict[str, list[Path]]]:
    """The largest image of each series among DICOM files of one folder.

    Returns:
        A file for each slide, and files that belong to none, by why. A file that cannot be read
        stands for itself where no other can, so that the job says what is wrong with it.
    """
    series: defaultdict[str, list[Path]] = defaultdict(list)
    others: defaultdict[str, list[Path]] = defaultdict(list)
    images: set[Path] = set()
    for path in sorted(paths):
        facts = _dicom_facts(path)
        if facts is None:
            others["file{s} that DICOM readers refuse"].append(path)
            continue
        uid, is_image = facts
        series[uid].append(path)
        images |= {path} if is_image else set()
    slides = []
    for members in series.values():
        if images.isdisjoint(members):
            others["DICOM file{s} without an image of a slide"] += members
        else:
            slides.append(max(images.intersection(members), key=_size_and_name))
    if not slides:
        left = [path for each in others.values() for path in each]
        return [max(left, key=_size_and_name)], {}
    return sorted(slides), dict(others)


def _size_and_name(path: Path) -> tuple[int, str]:
    return path.stat().st_size, path.name


def _dicom_facts(path: Path) -> tuple[str, bool] | None:
    """A file's series, and whether it is an image of the slide and not of its label."""
    from pydicom.filereader import read_partial

    tags = [_IMAGE_TYPE, _SERIES_UID]
    try:
        with path.open("rb") as file:
            facts = read_partial(
                file, lambda tag, vr, length: tag > _SERIES_UID, specific_tags=tags
            )
        kind = {str(value).strip().upper() for value in facts.get("ImageType", ())}
        return str(facts.get("SeriesInstanceUID", "")), kind.isdisjoint({"LABEL", "OVERVIEW"})
    except Exception:  # noqa: BLE001  # damaged ones raise whatever their bytes lead to
        return None
