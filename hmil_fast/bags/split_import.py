"""Import split files as folds: CSV files, CLAM's splits, and pickles of the HMIL release."""

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from hmil_fast.bags.fold import Fold
from hmil_fast.bags.label_file import Slide
from hmil_fast.bags.manifest import Manifest, write_splits
from hmil_fast.bags.match_names import plain
from hmil_fast.bags.split_pickle import read_plain_pickle
from hmil_fast.columns import MISSING, PARTS, part_of
from hmil_fast.errors import UsageError
from hmil_fast.tables import Say, quiet, read_table

FORMATS = ("csv", "clam", "hmil")
_HMIL_NAME = re.compile(r"(train|val|test)_splits_(\d+)\.pkl")
_Row = tuple[str, str, str, str]  # slide_id, part, label, patient_id


def write_import(
    paths: Sequence[Path | str], kind: str, out: Path | str, say: Say = quiet
) -> Manifest:
    """Read split files and write them as the manifest `out`; arguments as for `import_splits`.

    Raises:
        UsageError: A file cannot be read or used, or `out` exists.
    """
    manifest, out = import_splits([Path(path) for path in paths], kind, say), Path(out)
    if out.exists():
        raise UsageError(f"{out} exists", "delete it, or give another --out")
    write_splits(out, manifest.folds, manifest.slides, made_with={})
    return manifest


def import_splits(paths: Sequence[Path], kind: str, say: Say = quiet) -> Manifest:
    """Read split files.

    Args:
        paths: Files, or folders of such files.
        kind: "csv": a file a fold with the columns slide_id, split and, if stated, label and
            patient_id. "clam": a file a fold, splits_<i>.csv, columns train, val, test that list
            slides, or mark them with True and False. "hmil": {train,val,test}_splits_<i>.pkl, lists
            of (slide_id, label, path). Columns and parts may have other names that mean the same
            (`hmil_fast.columns`).
        say: Told which columns are read as something else, and which are not used.

    Returns:
        The folds in the order of the numbers in the file names; label and patient_id are "" where
        the files do not state them.

    Raises:
        UsageError: A file cannot be read or used; names file, line and field.
    """
    files = _files(paths, {"csv": "*.csv", "clam": "splits_*[0-9].csv", "hmil": "*.pkl"}[kind])
    if kind == "hmil":
        folds = _hmil(files)
    else:
        read = _csv if kind == "csv" else _clam
        if kind == "clam":
            _check_numbers(files)
        told: set[str] = set()

        def once(line: str, file: Path) -> None:  # files of a kind have one header
            tail = line.removeprefix(str(file))
            if tail not in told:
                told.add(tail)
                say(line)

        folds = [list(read(file, partial(once, file=file))) for file in files]
    names = {row[0]: plain(row[0]) for rows in folds for row in rows}
    if floats := [f"{name!r} is {other!r}" for name, other in names.items() if name != other]:
        say(f"{len(floats)} slide ids are written as a program changed them: {floats[0]}")
    folds = [[(names[row[0]], *row[1:]) for row in rows] for rows in folds]
    slides: dict[str, Slide] = {}
    for number, rows in enumerate(folds):
        for slide_id, _, label, patient in rows:
            new = Slide(slide_id, label, patient)
            if slides.setdefault(slide_id, new) != new:
                raise UsageError(
                    f"fold {number}: slide {slide_id!r} has another label or patient than before",
                    "make the files agree",
                )
    made = [
        Fold(*(tuple(row[0] for row in rows if row[1] == part) for part in PARTS)) for rows in folds
    ]
    for number, fold in enumerate(made):
        for part in ("train", "test"):
            if not getattr(fold, part):
                raise UsageError(
                    f"fold {number} of {files[0].parent} has no {part} slides", "complete the files"
                )
    return Manifest(made, list(slides.values()))


def _files(paths: Sequence[Path], pattern: str) -> list[Path]:
    """The files meant, in the order of the last number in their names."""
    files: list[Path] = []
    for path in paths:
        files += path.glob(pattern) if path.is_dir() else [path]
    if not files:
        raise UsageError(
            f"no {pattern} in {', '.join(map(str, paths))}", "name split files, or their folder"
        )
    return sorted(dict.fromkeys(files), key=_number)


def _number(path: Path) -> tuple[int, str]:
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else -1, path.name


def _check_numbers(files: Sequence[Path]) -> None:
    """CLAM writes every fold three times: its slides, the same as marks, and their counts."""
    seen: dict[tuple[Path, int], Path] = {}
    for path in files:
        other = seen.setdefault((path.parent, _number(path)[0]), path)
        if other != path:
            raise UsageError(
                f"{path} and {other.name} are of the same fold",
                "name one file a fold, or their folder, of which the splits_<i>.csv are read",
            )


def _csv(path: Path, say: Say) -> Iterable[_Row]:
    table = read_table(path, ("slide_id", "split", "label", "patient_id"), say)
    if not {"slide_id", "split"} <= table.columns.keys():
        raise UsageError(
            f"{path} line 1: no columns slide_id and split (there are: {table.listed()})",
            "begin the file with the line slide_id,split",
        )
    for line, row in table.rows:
        slide_id, split, label, patient = (
            table.cell(row, name) for name in ("slide_id", "split", "label", "patient_id")
        )
        part = part_of(split)
        if part is None or not slide_id:
            raise UsageError(
                f"{path} line {line}: {table.name('slide_id')} {slide_id!r} has "
                f"{table.name('split')} {split!r}",
                "write a slide and train, val or test in every line; a column of fold numbers "
                "belongs into the label file of `hmil-fast train`",
            )
        yield slide_id, part, label, "" if patient.lower() in MISSING else plain(patient)


def _clam(path: Path, say: Say) -> Iterable[_Row]:
    table = read_table(path, (), say)
    columns: dict[str, int] = {}
    for place, name in enumerate(table.header):
        part = part_of(name)
        if part is None:
            continue
        if part in columns:
            raise UsageError(
                f"{path} line 1: {table.header[columns[part]]!r} and {name!r} are both {part}",
                "remove one of the two columns",
            )
        columns[part] = place
    if not {"train", "test"} <= columns.keys():
        raise UsageError(
            f"{path} line 1: no columns train and test (there are: {table.listed()})",
            "give the splits_<i>.csv of CLAM",
        )
    if unused := [name for name in table.header if name and part_of(name) is None]:
        say(f"{path}: columns not used: {', '.join(unused)}")
    for line, row in table.rows:
        cells = {part: row[place] for part, place in columns.items()}
        if {cell.lower() for cell in cells.values()} <= {"true", "false"}:
            chosen = [part for part, cell in cells.items() if cell.lower() == "true"]
            if len(chosen) > 1:
                raise UsageError(
                    f"{path} line {line}: slide {row[0]!r} is in {' and in '.join(chosen)}",
                    "keep it in one part",
                )
            yield from ((row[0], part, "", "") for part in chosen)
        else:
            yield from (
                (cell, part, "", "") for part, cell in cells.items() if cell.lower() not in MISSING
            )


def _hmil(files: Sequence[Path]) -> list[list[_Row]]:
    folds: dict[int, dict[str, Path]] = {}
    for path in files:
        match = _HMIL_NAME.fullmatch(path.name)
        if match is None:
            raise UsageError(
                f"{path} is not named as HMIL names its splits",
                "give files such as train_splits_0.pkl, val_splits_0.pkl and test_splits_0.pkl",
            )
        folds.setdefault(int(match[2]), {})[match[1]] = path
    rows = []
    for number, parts in sorted(folds.items()):
        missing = {"train", "test"} - parts.keys()
        if missing:
            raise UsageError(
                f"fold {number} has no {' and no '.join(sorted(missing))} file",
                f"add {', '.join(f'{part}_splits_{number}.pkl' for part in sorted(missing))}",
            )
        rows.append([row for part, path in parts.items() for row in _hmil_rows(path, part)])
    return rows


def _hmil_rows(path: Path, part: str) -> Iterable[_Row]:
    rows = read_plain_pickle(path)
    if not isinstance(rows, list | tuple):
        raise UsageError(f"{path} holds a {type(rows).__name__}, not a list of slides", "check it")
    for number, row in enumerate(rows):
        plain = isinstance(row, list | tuple) and len(row) >= 2
        if not plain or not isinstance(row[0], str) or not isinstance(row[1], str | int):
            raise UsageError(
                f"{path}: entry {number} is not (slide_id, label, path)", "check the file"
            )
        yield row[0], part, str(row[1]), ""
