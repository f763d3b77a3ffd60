"""Read tables that people write: any encoding, comma, semicolon, tab or bar."""

import codecs
import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hmil_fast.columns import find_columns, is_known, spelling
from hmil_fast.errors import UsageError

Say = Callable[[str], None]

_MAX_BYTES = 256 * 2**20
_MAX_HEAD = 2**20
_DELIMITERS = ",;\t|"
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins as UTF-16's does
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def quiet(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Table:
    """The cells of a table.

    Attributes:
        path: The file.
        header: Names of the columns.
        rows: Line in the file and cells, as many as the header has; lines without text are left
            out. Cells have no spaces around them and are in NFC.
        columns: Column by meaning, of those that were asked for and are there.
    """

    path: Path
    header: list[str]
    rows: list[tuple[int, list[str]]]
    columns: dict[str, int] = field(default_factory=dict)

    def listed(self) -> str:
        """The names of the columns, for people."""
        names = ", ".join(name[:40] for name in self.header[:20]) or "none"
        return names + ", …" * (len(self.header) > 20)

    def name(self, meaning: str) -> str:
        """What the file calls the column of a meaning."""
        return self.header[self.columns[meaning]] if meaning in self.columns else meaning

    def cell(self, row: Sequence[str], meaning: str) -> str:
        """The cell of a row by its column's meaning, "" if there is no such column."""
        return row[self.columns[meaning]] if meaning in self.columns else ""


def read_table(path: Path, meanings: Sequence[str] = (), say: Say = quiet) -> Table:
    """Read a table and find its columns by what they mean (`hmil_fast.columns`).

    The delimiter is a comma, semicolon, tab or bar; the encoding UTF-8, UTF-16 with or without its
    mark, else Windows-1252, which is said.

    Args:
        path: The file.
        meanings: Keys of `COLUMNS`; a column is used for the first that fits it.
        say: Told which columns are read as something else than they are named, and which are not
            used.

    Raises:
        UsageError: The file cannot be read, is no table, or has the column to use twice.
    """
    text = read_text(path, say)
    named = re.match(r'"?sep=([,;\t|])', text)  # in a first line of its own, as Excel has it
    skip = 1 if named else 0

    def known(delimiter: str) -> tuple[int, int]:
        header = next(_rows(path, text[:_MAX_HEAD], delimiter, skip), (0, []))[1]
        return sum(map(is_known, header)), len(header)

    delimiter = named[1] if named else max(_DELIMITERS, key=known)
    lines = list(_rows(path, text, delimiter, skip))
    header = lines[0][1] if lines else []
    rows = [(line, _as_wide(path, line, row, len(header))) for line, row in lines[1:]]
    return Table(path, header, rows, _columns(path, header, rows, meanings, say))


def read_text(path: Path, say: Say | None = None, limit: int = _MAX_BYTES) -> str:
    """The text of a file that people wrote, in UTF-8 or UTF-16, without a byte-order mark.

    Args:
        path: The file.
        say: Told when it is neither and is read as Windows-1252; None refuses such a file.
        limit: The most bytes.

    Raises:
        UsageError: The file cannot be read, is larger than `limit` bytes, or is not text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "check the path") from None
    if len(data) > limit:
        raise UsageError(
            f"{path} is larger than {limit >> 20} MiB", "give the table or the tree, not the data"
        )
    if data.startswith(b"PK\x03\x04"):
        raise UsageError(f"{path} is a spreadsheet or an archive, not text", "save it as CSV UTF-8")
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if encoding is None and b"\0" in data[:1000]:  # the zeros of UTF-16 lie on one side
        encoding = "utf-16-le" if b"\0" not in data[:1000:2] else "utf-16-be"
    try:
        return data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        wrong = error
    try:
        if encoding is not None or say is None:
            raise wrong
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 ({wrong})", "save it as UTF-8") from None
    say(f"{path} is not UTF-8; it is read as Windows-1252 (Latin-1)")
    return text


def _rows(path: Path, text: str, delimiter: str, skip: int) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of every row that has text, without spaces around them."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        for number, row in enumerate(reader):
            cells = [unicodedata.normalize("NFC", cell.strip()) for cell in row]
            if number >= skip and any(cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise UsageError(
            f"{path} line {reader.line_num}: {error}", "save the file as comma-separated text"
        ) from None


def _as_wide(path: Path, line: int, row: list[str], width: int) -> list[str]:
    """The row with as many cells as the header has."""
    if any(row[width:]):
        raise UsageError(
            f"{path} line {line}: {len(row)} fields where the header has {width}",
            "name every column in the first line, and put a field that holds a comma in double "
            "quotes",
        )
    return (row + [""] * (width - len(row)))[:width]


def _columns(
    path: Path,
    header: Sequence[str],
    rows: Sequence[tuple[int, Sequence[str]]],
    meanings: Sequence[str],
    say: Say,
) -> dict[str, int]:
    cells = [row for _, row in rows]
    used: dict[str, int] = {}
    others: dict[str, list[int]] = {}
    for meaning in meanings:
        places = [p for p in find_columns(header, meaning, cells) if p not in used.values()]
        if not places:
            continue
        name = header[places[0]]
        if sum(spelling(other) == spelling(name) for other in header) > 1:
            raise UsageError(f"{path} line 1: two columns named {name}", "remove one")
        used[meaning], *others[meaning] = places
        if name.lower() != meaning:
            say(f"{path}: column {name!r} is read as {meaning}")
    named = set(used.values())
    for meaning, places in others.items():
        for place in sorted(set(places) - named):
            named.add(place)
            say(
                f"{path}: {header[place]!r} could be {meaning} too; "
                f"{header[used[meaning]]!r} is used"
            )
    unused = [
        name or f"column {place + 1}, which has no name"
        for place, name in enumerate(header)
        if place not in named and (name or any(row[place] for row in cells))
    ]
    if meanings and unused:
        say(f"{path}: columns not used: {', '.join(unused)}")
    return used
