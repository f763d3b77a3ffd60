"""The label file: which slide has which diagnosis and is whose."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree

PARTS = ("train", "val", "test")
MISSING = {"", "nan", "na"}  # as pandas and R write a cell without a value
_COLUMNS = ("slide_id", "label", "patient_id", "split")
_MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Slide:
    """One row of the label file; `split` is the official part, if the file names one."""

    slide_id: str
    label: str
    patient_id: str
    split: str | None = None


def read_labels(path: Path, tree: LabelTree, inner: bool = False) -> list[Slide]:
    """Read ``slide_id,label[,patient_id][,split]``; without patient_id each slide is a patient.

    Further columns are ignored. Spaces around a field and a byte-order mark do not count.

    Args:
        path: The CSV file.
        tree: The label tree.
        inner: Whether a label may be an inner node; `LabelTree.path` says what it names.

    Raises:
        UsageError: The file cannot be read or a row cannot be used; names file, line and field.
    """
    rows = _rows(path)
    header = [name.strip().lower() for name in next(rows, (0, []))[1]]
    for name in _COLUMNS:
        if header.count(name) > 1:
            raise UsageError(f"{path} line 1: two columns named {name}", "remove one")
        if name in _COLUMNS[:2] and name not in header:
            raise UsageError(
                f"{path} line 1: no column {name} (columns: {', '.join(header) or 'none'})",
                "begin the file with the line slide_id,label or slide_id,label,patient_id,split",
            )
    slides: list[Slide] = []
    lines: dict[str, int] = {}
    for line, row in rows:
        if len(row) > len(header):
            raise UsageError(
                f"{path} line {line}: {len(row)} fields where the header has {len(header)}",
                "put a field that holds a comma in double quotes",
            )
        padded = row + [""] * (len(header) - len(row))
        fields = dict(zip(header, (field.strip() for field in padded), strict=True))
        slide = _slide(fields, f"{path} line {line}", tree, inner)
        if slide.slide_id in lines:
            raise UsageError(
                f"{path} line {line}: slide_id {slide.slide_id!r} is already on line "
                f"{lines[slide.slide_id]}",
                "keep one line per slide",
            )
        lines[slide.slide_id] = line
        slides.append(slide)
    if not slides:
        raise UsageError(f"{path} names no slides", "add a line per slide below the header")
    _check_official(path, slides, lines)
    return slides


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of every line that is not empty."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path} is larger than 256 MiB", "give the label file, not the data")
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                if any(field.strip() for field in row):
                    yield reader.line_num, row
    except OSError as error:
        raise UsageError(f"cannot read the labels {path}: {error}", "check the path") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 ({error})", "save it as CSV UTF-8") from None
    except csv.Error as error:
        raise UsageError(
            f"{path} line {reader.line_num}: {error}", "save the file as comma-separated text"
        ) from None


def _slide(fields: dict[str, str], where: str, tree: LabelTree, inner: bool) -> Slide:
    for name in ("slide_id", "label", "patient_id"):
        value = fields.get(name)
        if value == "" or (value and name == "patient_id" and value.lower() in MISSING):
            raise UsageError(
                f"{where}: {name} is empty" + (f" ({value})" if value else ""),
                "write the patient, or repeat the slide_id there"
                if name == "patient_id"
                else "fill it in, or remove the line",
            )
    label = fields["label"]
    try:
        if not inner or tree.path(label)[-1] >= 0:  # else a node with one leaf below it is that
            label = tree.leaves[tree.leaf(label)]
    except UsageError as error:
        raise UsageError(f"{where}: {error.what}", error.fix) from None
    split = fields.get("split", "").lower()
    if split and split not in PARTS:
        raise UsageError(
            f"{where}: split {fields['split']!r} is none of {', '.join(PARTS)}", "correct it"
        )
    patient = fields.get("patient_id", fields["slide_id"])
    return Slide(fields["slide_id"], label, patient, split or None)


def _check_official(path: Path, slides: Sequence[Slide], lines: dict[str, int]) -> None:
    """Either every slide has a split or none, and a patient has one only."""
    if not any(s.split for s in slides):
        return
    first: dict[str, Slide] = {}
    for slide in slides:
        where = f"{path} line {lines[slide.slide_id]}"
        if slide.split is None:
            raise UsageError(f"{where}: split is empty", "write train, val or test in every line")
        other = first.setdefault(slide.patient_id, slide)
        if other.split != slide.split:
            raise UsageError(
                f"{where}: patient_id {slide.patient_id!r} is in split {slide.split} here and in "
                f"{other.split} on line {lines[other.slide_id]}",
                "put all slides of a patient in one split",
            )
