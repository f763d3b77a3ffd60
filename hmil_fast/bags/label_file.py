"""Read the label file: slide id, label, patient and split of every slide."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hmil_fast.bags.match_names import alike, plain
from hmil_fast.columns import MISSING, PARTS, find_columns, part_of
from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree
from hmil_fast.tables import Say, Table, quiet, read_table

_TCGA = re.compile(r"TCGA-\w\w-\w{4}(?=-|$)", re.IGNORECASE)  # of a barcode, what names the patient


@dataclass(frozen=True)
class Slide:
    """One row of the label file.

    Attributes:
        slide_id: The slide.
        label: A leaf of the tree, or with `read_labels(inner=True)` any node.
        patient_id: The patient.
        split: "train", "val" or "test" where the file has an official split, or the name of the
            fold that tests the slide where the file has folds.
    """

    slide_id: str
    label: str
    patient_id: str
    split: str | None = None


def read_labels(
    path: Path | str,
    tree: LabelTree | Path | str,
    inner: bool = False,
    say: Say = quiet,
    leaves_only: bool = False,
) -> list[Slide]:
    """Read a table of slide_id, label and, if there are, patient_id and split (or folds).

    Columns are found by what they mean (`hmil_fast.columns`); without patients each slide is one.

    Args:
        path: The table.
        tree: The label tree, or a YAML file of it.
        inner: Whether a label may be an inner node; `LabelTree.path` says what it names.
        say: Told which columns are used and which are not, and what is read as something else.
        leaves_only: Leave out slides whose label is an inner node.

    Raises:
        UsageError: The file cannot be read or a row cannot be used; names file, line and field.

    Example:
        >>> import hmil_fast
        >>> slides = hmil_fast.read_labels("labels.csv", "tree.yaml")
        >>> slides[0].slide_id, slides[0].label
        ('s00', 'N')
    """
    path = Path(path)
    if not isinstance(tree, LabelTree):
        tree = LabelTree.from_yaml(Path(tree))
    table = read_table(path, ("slide_id", "label", "patient_id", "split"), say)
    for name in ("slide_id", "label"):
        if name not in table.columns:
            raise UsageError(
                f"{path} line 1: no column {name} (columns: {table.listed()})",
                "begin the file with the line slide_id,label or slide_id,label,patient_id,split",
            )
    slides: list[Slide] = []
    lines: dict[str, int] = {}
    for line, row in table.rows:
        slide = _slide(table, line, row)
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
    slides = _with_nodes(table, slides, tree, say)
    slides = slides if inner else _of_leaves(table, slides, tree, leaves_only, say)
    slides = _of_patients(table, slides, say)
    return _with_splits(table, slides, lines, say)


def _slide(table: Table, line: int, row: Sequence[str]) -> Slide:
    where = f"{table.path} line {line}"
    slide_id, label, patient, split = (
        table.cell(row, name) for name in ("slide_id", "label", "patient_id", "split")
    )
    if not slide_id or not label:
        name = table.name("label" if slide_id else "slide_id")
        raise UsageError(f"{where}: {name} is empty", "fill it in, or remove the line")
    if "patient_id" in table.columns and patient.lower() in MISSING:
        raise UsageError(
            f"{where}: {table.name('patient_id')} is empty" + (f" ({patient})" if patient else ""),
            "write the patient, or repeat the slide_id there",
        )
    split = "" if split.lower() in MISSING else split
    return Slide(slide_id, label, plain(patient) if patient else slide_id, split or None)


def _with_nodes(table: Table, slides: Sequence[Slide], tree: LabelTree, say: Say) -> list[Slide]:
    """The slides with the tree's own names as labels; a leaf where only one lies below a node."""
    nodes = {name for level in tree.names for name in level}
    shapes = Counter(map(alike, nodes))
    like = {alike(name): name for name in nodes if shapes[alike(name)] == 1}
    read: dict[str, str] = {}
    for (line, _), slide in zip(table.rows, slides, strict=True):
        if slide.label in read:
            continue
        try:
            name = slide.label if slide.label in nodes else like.get(alike(slide.label))
            path = tree.path(slide.label if name is None else name)
        except UsageError as error:
            raise UsageError(f"{table.path} line {line}: {error.what}", error.fix) from None
        assert name is not None
        read[slide.label] = tree.leaves[int(path[-1])] if path[-1] >= 0 else name
    changed = [f"{label!r} as {name!r}" for label, name in read.items() if label != name]
    if changed:
        say(f"{table.path}: labels are read as nodes of the tree: {', '.join(changed[:10])}")
    return [replace(slide, label=read[slide.label]) for slide in slides]


def _of_leaves(
    table: Table, slides: Sequence[Slide], tree: LabelTree, leave_out: bool, say: Say
) -> list[Slide]:
    coarse = Counter(slide.label for slide in slides if slide.label not in tree.leaves)
    leaves = [slide for slide in slides if slide.label not in coarse]
    if not coarse:
        return leaves
    what = ", ".join(
        f"{count} {label!r} (its leaves: {', '.join(tree.below(label))})"
        for label, count in sorted(coarse.items())
    )
    what = (
        f"{table.path}: {sum(coarse.values())} of {len(slides)} slides have a label that is an "
        f"inner node of the tree, not a leaf: {what}"
    )
    if not leaves or not leave_out:
        raise UsageError(
            what,
            "give train --leaves-only to leave these slides out, or write a leaf for each"
            if leaves
            else "write a leaf for each; `hmil-fast evaluate` takes such labels as they are",
        )
    say(f"{what}; they are left out")
    return leaves


def _of_patients(table: Table, slides: Sequence[Slide], say: Say) -> list[Slide]:
    """The slides with one name per patient, however it is written."""
    if "patient_id" not in table.columns:
        codes = [_TCGA.match(slide.slide_id.rpartition("/")[2]) for slide in slides]
        if all(codes):
            say(f"{table.path} has no column of patients; they are read from the TCGA barcodes")
            patients = [code[0] for code in codes if code]
            return [replace(s, patient_id=p) for s, p in zip(slides, patients, strict=True)]
        say(f"{table.path} has no column of patients: every slide counts as a patient")
        return list(slides)
    _compare_patients(table, say)
    first: dict[str, str] = {}
    several: dict[str, str] = {}
    for slide in slides:
        name = first.setdefault(alike(slide.patient_id), slide.patient_id)
        if name != slide.patient_id:
            several[slide.patient_id] = name
    if several:
        some = ", ".join(f"{a!r} and {b!r}" for a, b in list(several.items())[:3])
        say(f"{table.path}: {len(several)} patients are written in two ways and are one: {some}")
    return [replace(s, patient_id=several.get(s.patient_id, s.patient_id)) for s in slides]


def _compare_patients(table: Table, say: Say) -> None:
    """Say where another column would keep slides together that the patients do not."""
    used = table.columns["patient_id"]
    for place in find_columns(table.header, "patient_id"):
        patients = defaultdict[str, set[str]](set)
        for _, row in table.rows:
            patients[row[place]].add(row[used])
        wider = [name for name, held in patients.items() if name and len(held) > 1]
        if wider:
            say(
                f"{table.path}: {len(wider)} of {table.header[place]!r} have several "
                f"{table.header[used]!r}, such as {wider[0]!r}: if that is the patient, remove the "
                f"column {table.header[used]!r}"
            )


def _fold_of(text: str) -> str | None:
    """The number of a fold written as 3, 3.0 or fold_3."""
    match = re.fullmatch(r"(?:fold|split|cv|k)?[\s_]*(-?\d+)(?:\.0+)?", text.casefold())
    return match and str(int(match[1]))


def _with_splits(
    table: Table, slides: Sequence[Slide], lines: dict[str, int], say: Say
) -> list[Slide]:
    """The slides with their parts or folds: all have one, and all slides of a patient the same."""
    column = table.name("split")
    texts = {s.slide_id: s.split or "" for s in slides}
    if not any(texts.values()):
        if "split" in table.columns:
            say(f"{table.path}: {column} is empty in every line and not used")
        return list(slides)
    parts = {text: part_of(text) for text in texts.values() if text}
    numbers = [text for text in parts if _fold_of(text)]
    folds = len(numbers) == len(parts)
    if numbers and not folds:
        word = next(text for text in parts if text not in numbers)
        line = next(lines[name] for name, text in texts.items() if text == word)
        raise UsageError(
            f"{table.path} line {line}: {column} is {word!r}, elsewhere a number such as "
            f"{numbers[0]!r}",
            "write a fold's number in every line, or train, val or test in every line",
        )
    first: dict[str, Slide] = {}
    read = []
    for slide in slides:
        where = f"{table.path} line {lines[slide.slide_id]}"
        text = texts[slide.slide_id]
        if not text:
            raise UsageError(
                f"{where}: {column} is empty",
                "write the fold in every line"
                if folds
                else "write train, val or test in every line",
            )
        if not folds and parts[text] is None:
            raise UsageError(
                f"{where}: {column} {text!r} is none of {', '.join(PARTS)}",
                "correct it, or write a fold's number in every line",
            )
        known = replace(slide, split=_fold_of(text) if folds else parts[text])
        other = first.setdefault(slide.patient_id, known)
        if other.split != known.split:
            raise UsageError(
                f"{where}: {table.name('patient_id')} {slide.patient_id!r} is in {column} "
                f"{text} here and in {texts[other.slide_id]} on line {lines[other.slide_id]}",
                f"put all slides of a patient in one {'fold' if folds else 'split'}",
            )
        read.append(known)
    if folds:
        names = sorted({str(s.split) for s in read}, key=int)
        say(f"{table.path}: {column} names the folds that test the slides: {', '.join(names)}")
    return read
