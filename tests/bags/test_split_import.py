"""Split files of others: CSV, CLAM and HMIL's pickles, and what hides in a pickle."""

import io
import os
import pickle  # noqa: TID251 - to write what the importer must read, and what it must refuse
from pathlib import Path

import pytest

from hmil_fast.bags.fold import Fold
from hmil_fast.bags.manifest import read_manifest
from hmil_fast.bags.split_import import import_splits
from hmil_fast.bags.split_pickle import read_plain_pickle
from hmil_fast.cli.main import main
from hmil_fast.errors import UsageError


def test_official_csv(tmp_path: Path) -> None:
    path = tmp_path / "official.csv"
    path.write_text(
        "\ufeffSlide_ID,extra,Split,label,patient_id\nb,1,Training,N,P1\n\na,2,test,IC,P2\n"
        "c,3,Validation,N,P3\nd,,train,N,NA\ne,,test,N,NA\n",
        encoding="utf-8",
    )
    got = import_splits([path], "csv")
    assert got.folds == [Fold(("b", "d"), ("c",), ("a", "e"))]
    assert [(s.slide_id, s.label, s.patient_id) for s in got.slides] == [
        ("b", "N", "P1"),
        ("a", "IC", "P2"),
        ("c", "N", "P3"),
        ("d", "N", ""),
        ("e", "N", ""),
    ]


def test_clam_csv_in_both_styles_and_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for i in (0, 2, 10):
        (tmp_path / f"splits_{i}.csv").write_text(
            f",train,val,test\n0,a{i},c,d\n1,b,,e\n2,f,,\n", encoding="utf-8"
        )
    got = import_splits([tmp_path], "clam")
    assert got.folds == [Fold((f"a{i}", "b", "f"), ("c",), ("d", "e")) for i in (0, 2, 10)]
    assert {s.patient_id for s in got.slides} == {""}
    style = tmp_path / "bool" / "splits_0_bool.csv"
    style.parent.mkdir()
    style.write_text(
        ",train,val,test\nx,True,False,False\ny,False,False,True\nz,False,False,False\n"
    )
    assert import_splits([style], "clam").folds == [Fold(("x",), (), ("y",))]


def test_a_folder_as_clam_leaves_it(tmp_path: Path) -> None:
    """Beside the slides of a fold lie the same as marks, and counts that are no slides."""
    for i in (0, 1):
        (tmp_path / f"splits_{i}.csv").write_bytes(
            f"\ufeff,train,val,test\r\n1,b,NaN,e{i}\r\n0,a,c,nan\r\n".encode()
        )
        (tmp_path / f"splits_{i}_bool.csv").write_text(",train,val,test\na,True,False,False\n")
        (tmp_path / f"splits_{i}_descriptor.csv").write_text(",train,val,test\ntumor,2,1,1\n")
    folds = [Fold(("b", "a"), ("c",), (f"e{i}",)) for i in (0, 1)]
    assert import_splits([tmp_path], "clam").folds == folds
    with pytest.raises(UsageError, match=r"splits_0_\w+\.csv and splits_0\.csv are of the same"):
        import_splits(list(tmp_path.glob("*.csv")), "clam")


TABLES = Path(__file__).parent.parent / "data" / "tables"


def test_whole_numbers_as_pandas_leaves_them() -> None:
    said: list[str] = []
    got = import_splits([TABLES / "float"], "clam", said.append)
    assert sorted(s.slide_id for s in got.slides) == [str(n) for n in range(1000, 1030)]
    assert [[len(p) for p in (f.train, f.val, f.test)] for f in got.folds] == [[18, 5, 7]] * 2
    assert len(said) == 1
    assert said[0].startswith("17 slide ids are written as a program changed them: '")


def test_columns_and_parts_by_other_names(tmp_path: Path) -> None:
    said: list[str] = []
    path = TABLES / "bracs_set.csv"
    got = import_splits([path], "csv", said.append)
    assert [len(p) for p in (got.folds[0].train, got.folds[0].val, got.folds[0].test)] == [
        36,
        12,
        12,
    ]
    assert got.slides[0].patient_id == "ps000"
    assert said == [f"{path}: column 'Set' is read as split"]
    for i in (0, 1):
        (tmp_path / f"splits_{i}.csv").write_text(";Training;Validation;Testing\n0;a;b;c\n1;d;;\n")
    folds = import_splits([tmp_path], "clam").folds
    assert folds == [Fold(("a", "d"), ("b",), ("c",))] * 2
    said.clear()
    (tmp_path / "splits_0.csv").write_text(",train,train_label,test\n0,a,1,c\n")
    assert import_splits([tmp_path / "splits_0.csv"], "clam", said.append).folds[0].train == ("a",)
    assert said[0].endswith("splits_0.csv: columns not used: train_label")
    (tmp_path / "splits_0.csv").write_text(",train,training,test\n0,a,b,c\n")
    with pytest.raises(UsageError, match="'train' and 'training' are both train"):
        import_splits([tmp_path / "splits_0.csv"], "clam")
    for i in (0, 1):
        (tmp_path / f"fold{i}.csv").write_text("slide,split,case,note\na,train,P,x\nb,test,Q,y\n")
    said.clear()
    import_splits([tmp_path / "fold0.csv", tmp_path / "fold1.csv"], "csv", said.append)
    assert [line.split(": ")[1] for line in said] == [
        "column 'slide' is read as slide_id", "column 'case' is read as patient_id",
        "columns not used",
    ]  # fmt: skip


def hmil_pickle(path: Path, rows: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(rows, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_hmil_pickles(tmp_path: Path, protocol: int) -> None:
    for fold in (0, 1):
        for part in ("train", "val", "test"):
            rows = [[f"{part}-{fold}", "PB", f"/data/{part}.pt"], [f"{part}-{fold}b", 3, "/x.pt"]]
            hmil_pickle(tmp_path / f"{part}_splits_{fold}.pkl", rows, protocol)
    got = import_splits([tmp_path], "hmil")
    assert got.folds[1] == Fold(("train-1", "train-1b"), ("val-1", "val-1b"), ("test-1", "test-1b"))
    assert {s.label for s in got.slides} == {"PB", "3"}
    (tmp_path / "test_splits_1.pkl").unlink()
    with pytest.raises(UsageError, match="fold 1 has no test file") as error:
        import_splits([tmp_path], "hmil")
    assert "test_splits_1.pkl" in error.value.fix


class Hidden:
    """What a pickle may make of a reader."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.touched),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_a_program_is_named_and_not_run(tmp_path: Path, protocol: int) -> None:
    touched = tmp_path / "touched"
    path = hmil_pickle(tmp_path / "train_splits_0.pkl", [["a", Hidden(touched), "b"]], protocol)
    with pytest.raises(UsageError, match=r"train_splits_0\.pkl: the pickle asks for posix\.mkdir"):
        read_plain_pickle(path)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a pickle of plain lists"),
        (b"slide_id,split\na,train\n", "not a pickle of plain lists"),
        (pickle.dumps(["a"])[:-3], "not a pickle of plain lists"),
        (pickle.dumps({1, 2}, protocol=2), r"asks for __builtin__\.set"),
        (pickle.dumps(Path("a")), r"asks for pathlib"),
        (b"\x80\x02Pbad\n.", "not a pickle of plain lists"),
        # a memo index that would allocate 16 GB
        (b"\x80\x02]r\xff\xff\xff\x7f.", "memo index 2147483647"),
        (pickle.dumps([("a", 10**5000)]), "holds a LONG4"),
        (b"\x80\x04\x8f.", "holds a EMPTY_SET"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\x00\x00\x00a.", "not a pickle of plain lists"),
    ],
)
def test_damaged_and_hostile_pickles_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_plain_pickle(path)


def test_a_pickle_has_a_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    with path.open("wb") as file:
        file.truncate(8 * 2**20 + 1)
    with pytest.raises(UsageError, match="larger than 8 MiB"):
        read_plain_pickle(path)
    assert read_plain_pickle(hmil_pickle(path, [("a", 1, {"b": None})])) == [("a", 1, {"b": None})]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("csv", "name,split\na,train\n", "line 1: no columns slide_id and split"),
        ("csv", "slide_id,split\na,train\nb,\n", "line 3: slide_id 'b' has split ''"),
        ("csv", "slide_id,split\na,train\nb,other\n", "line 3: .* split 'other'"),
        ("csv", "slide_id,split\na,train\n", "fold 0 .* has no test slides"),
        ("clam", "slide_id,split\na,train\n", "line 1: no columns train and test"),
        (
            "clam",
            ",train,val,test\na,True,True,False\n",
            "line 2: slide 'a' is in train and in val",
        ),
        ("csv", "", "line 1: no columns"),
        ("csv", "split,slide_id\ntrain\n", "line 2: slide_id '' has split 'train'"),
        ("csv", "slide_id,split,split\na,train,test\n", "line 1: two columns named split"),
    ],
)
def test_faulty_tables_are_refused(tmp_path: Path, kind: str, text: str, message: str) -> None:
    path = tmp_path / "splits_0.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        import_splits([path], kind)
    with pytest.raises(UsageError, match=r"nowhere\.csv"):
        import_splits([tmp_path / "nowhere.csv"], kind)


def test_the_command_writes_a_manifest_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, test in enumerate(("d", "a")):
        rest = [s for s in "abcd" if s != test]
        text = io.StringIO()
        text.write(",train,val,test\n")
        text.write(f"0,{rest[0]},{rest[2]},{test}\n1,{rest[1]},,\n")
        (tmp_path / f"splits_{i}.csv").write_text(text.getvalue())
    out = tmp_path / "splits.json"
    command = ["splits", "import", str(tmp_path), "--format", "clam", "--out", str(out)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "fold 1: train 2, val 1, test 1" in said
    assert "2 of 4 slides are tested" in said
    assert "no patients are stated" in said
    assert read_manifest(out).folds[0] == Fold(("a", "b"), ("c",), ("d",))
    assert main(command) == 2
    assert "exists" in capsys.readouterr().err
    (tmp_path / "splits_0.csv").write_text(",train,test\n0,a,a\n")
    assert main([*command[:-1], str(tmp_path / "other.json")]) == 2
    assert "fold 0 has slide 'a' in train and in test" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["csv", "clam"])
def test_a_row_longer_than_the_header_is_refused(tmp_path: Path, kind: str) -> None:
    """Its fields would be taken for other columns, and slides for other parts."""
    path = tmp_path / "splits_0.csv"
    header = "slide_id,split" if kind == "csv" else ",train,test"
    path.write_text(f"{header}\na,train,b,c\nd,test,e,f\n")
    with pytest.raises(UsageError, match=r"line 2: 4 fields where the header has [23]"):
        import_splits([path], kind)
