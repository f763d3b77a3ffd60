"""Tables as people and programs write them: encodings, delimiters, names of columns."""

from pathlib import Path

import pytest

from hmil_fast.columns import part_of
from hmil_fast.errors import UsageError
from hmil_fast.tables import read_table

ALL = ("slide_id", "label", "patient_id", "split")
PLAIN = "slide_id,label,patient_id\nä1,N,P\n2,IC,Q\n"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]
)
def test_any_encoding_and_delimiter(tmp_path: Path, encoding: str, delimiter: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(PLAIN.replace(",", delimiter).replace("\n", "\r\n").encode(encoding))
    said: list[str] = []
    table = read_table(path, ALL, said.append)
    assert table.rows == [(2, ["ä1", "N", "P"]), (3, ["2", "IC", "Q"])]
    assert table.columns == {"slide_id": 0, "label": 1, "patient_id": 2}
    assert said == ([f"{path} is not UTF-8; it is read as Windows-1252 (Latin-1)"] * (
        encoding == "cp1252"))  # fmt: skip


def test_cells_as_spreadsheets_leave_them(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    text = 'sep=;\nslide_id;label;;\n" a; b ";N;;\n\n;;;\ne\u0301;"I""C"; ;\n'
    path.write_text(text, encoding="utf-8")
    table = read_table(path, ALL)
    assert table.rows == [(3, ["a; b", "N", "", ""]), (6, ["é", 'I"C', "", ""])]
    path.write_text('slide_id, label\n"a", "N, M"\n')
    assert read_table(path).rows == [(2, ["a", "N, M"])]


NAMES = """patient_id patient PATIENT Patient-ID patientId PatientID patient_no patient_barcode
    bcr_patient_barcode case_id case CASE_ID case_submitter_id cases.submitter_id submitter_id
    Subject subject_id participant donor_id icgc_donor_id pid MRN individual person_id"""


@pytest.mark.parametrize("name", NAMES.split())
def test_columns_that_name_patients(tmp_path: Path, name: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"{name},slide_id,label\nP,a,N\n")
    said: list[str] = []
    assert read_table(path, ALL, said.append).columns["patient_id"] == 0
    expected = [] if name == "patient_id" else [f"{path}: column {name!r} is read as patient_id"]
    assert said == expected


def test_lines_that_end_as_on_an_old_mac(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"slide_id,label\ra,N\rb,IC\r")
    assert read_table(path).rows == [(2, ["a", "N"]), (3, ["b", "IC"])]


@pytest.mark.parametrize(
    "name", ["patient_age", "patient_sex", "case_control", "hospital", "id", "stage", "block"]
)
def test_columns_that_do_not(tmp_path: Path, name: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"{name},slide_id,label,,x\nP,a,N,1,2\n")
    said: list[str] = []
    assert "patient_id" not in read_table(path, ALL, said.append).columns
    assert said == [f"{path}: columns not used: {name}, column 4, which has no name, x"]


def test_of_two_columns_the_plainer_one_is_used_and_both_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("submitter_id,case,slide_id,patient,label,Set,fold\na,b,c,d,N,train,0\n")
    said: list[str] = []
    table = read_table(path, ALL, said.append)
    assert {meaning: table.name(meaning) for meaning in ALL} == {
        "slide_id": "slide_id", "label": "label", "patient_id": "patient", "split": "Set",
    }  # fmt: skip
    assert said == [
        f"{path}: column 'patient' is read as patient_id",
        f"{path}: column 'Set' is read as split",
        f"{path}: 'submitter_id' could be patient_id too; 'patient' is used",
        f"{path}: 'case' could be patient_id too; 'patient' is used",
        f"{path}: 'fold' could be split too; 'Set' is used",
    ]


def test_a_set_that_names_no_parts_is_not_a_split(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("slide_id,label,cohort,group\na,N,TCGA,train\nb,N,CPTAC,\n")
    table = read_table(path, ALL)
    assert table.name("split") == "group"
    path.write_text("slide_id,label,group\na,N,control\nb,N,test\n")
    assert "split" not in read_table(path, ALL).columns


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("Training", "train"), ("TRAIN", "train"), ("train_set", "train"), ("Trainingset", "train"),
        ("Validation", "val"), ("valid", "val"), ("dev set", "val"), ("tuning", "val"),
        ("Testing", "test"), ("test", "test"), ("hold-out", "test"), ("test data", "test"),
        ("", None), ("set", None), ("tester", None), ("A", None), ("0", None),
    ],
)  # fmt: skip
def test_words_for_the_parts(word: str, part: str | None) -> None:
    assert part_of(word) == part


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04rest", "is a spreadsheet or an archive"),
        (b"slide_id,label\na\x81,N\n", "is not UTF-8"),
        (b"\xff\xfea", "is not UTF-8"),
        (b"slide_id,Slide ID\na,b\n", "two columns named slide_id"),
        (b"slide_id,label\na,N,b\n", "line 2: 3 fields where the header has 2"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_table(path, ALL)


def test_a_table_has_a_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with path.open("wb") as file:
        file.truncate(256 * 2**20 + 1)
    with pytest.raises(UsageError, match="larger than 256 MiB"):
        read_table(path)
