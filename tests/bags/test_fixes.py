"""What a message on labels, trees, splits and folds says to do is done, and then it works."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hmil_fast.bags.manifest import read_manifest
from hmil_fast.bags.match_names import match_slides
from hmil_fast.bags.split_import import import_splits
from hmil_fast.bags.splits import Slide, make_folds, read_labels, write_splits
from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree

TREE = LabelTree.from_nested({"benign": ["N", "PB"], "malignant": ["IC", "DCIS"]})


def refused(call: Callable[[], object], fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("wrong", "fix", "mended"),
    [
        ("a,N\n", "begin the file with the line slide_id,label", "slide_id,label\na,N\n"),
        ("slide_id,label\n", "add a line per slide", "slide_id,label\na,N\n"),
        ("slide_id,label\na,\nb,N\n", "fill it in, or remove the line", "slide_id,label\nb,N\n"),
        ("slide_id,label\na,N\na,N\n", "keep one line per slide", "slide_id,label\na,N\n"),
        ("slide_id,label,label\na,N,N\n", "remove one", "slide_id,label\na,N\n"),
        (
            "slide_id,label\nb,left,N\n",
            "put a field that holds a comma in double quotes",
            'slide_id,label\n"b,left",N\n',
        ),
        (
            "slide_id,label\nb,N,x\n",
            "name every column in the first line",
            "slide_id,label,note\nb,N,x\n",
        ),
        ("slide_id,label\na,XX\n", "correct the label", "slide_id,label\na,N\n"),
        (
            "slide_id,label\na,benign\nb,N\n",
            "write a leaf for each",
            "slide_id,label\na,PB\nb,N\n",
        ),
        (
            "slide_id,label,case\na,N,NA\n",
            "repeat the slide_id there",
            "slide_id,label,case\na,N,a\n",
        ),
        (
            "slide_id,label,split\na,N,train\nb,N,\n",
            "write train, val or test in every line",
            "slide_id,label,split\na,N,train\nb,N,test\n",
        ),
        (
            "slide_id,label,split\na,N,train\nb,N,B\n",
            "correct it",
            "slide_id,label,split\na,N,train\nb,N,test\n",
        ),
        (
            "slide_id,label,fold\na,N,0\nb,N,x\n",
            "write a fold's number in every line",
            "slide_id,label,fold\na,N,0\nb,N,1\n",
        ),
        (
            "slide_id,label,fold\na,N,0\nb,N,\n",
            "write the fold in every line",
            "slide_id,label,fold\na,N,0\nb,N,1\n",
        ),
        (
            "slide_id,label,case,Set\na,N,P,train\nb,N,P,test\n",
            "put all slides of a patient in one split",
            "slide_id,label,case,Set\na,N,P,train\nb,N,P,train\n",
        ),
    ],
)
def test_labels(tmp_path: Path, wrong: str, fix: str, mended: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(wrong)
    refused(lambda: read_labels(path, TREE), fix)
    path.write_text(mended)
    assert read_labels(path, TREE)


def test_labels_that_are_inner_nodes(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("slide_id,label\na,benign\nb,N\n")
    refused(lambda: read_labels(path, TREE), "--leaves-only to leave these slides out")
    assert len(read_labels(path, TREE, leaves_only=True)) == 1
    path.write_text("slide_id,label\na,benign\n")
    refused(lambda: read_labels(path, TREE), "`hmil-fast evaluate` takes such labels")
    assert read_labels(path, TREE, inner=True)[0].label == "benign"


def test_encodings(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    for data in (b"PK\x03\x04", b"slide_id,label\n\x81,N\n"):
        path.write_bytes(data)
        refused(lambda: read_labels(path, TREE), "save it as")
    path.write_bytes("slide_id,label\nä,N\n".encode())
    assert read_labels(path, TREE)


@pytest.mark.parametrize(
    ("wrong", "fix", "mended"),
    [
        ("", "write nested mappings, for instance `positive: {micro: , macro: }`",
         "positive: {micro: , macro: }"),
        ("[only]", "name at least two", "[only, other]"),
        ("[]", "name at least two labels", "[a, b]"),
        ("{a: [x, NO], b: }", 'put it in quotes: "NO"', '{a: [x, "NO"], b: }'),
        ("{a: [x, [y, z]], b: }", "write `name: [a, b]` for a node", "{a: [x, name: [y, z]], b: }"),
        ("{a: [x, ' '], b: }", "write it, or drop the entry", "{a: [x], b: }"),
        ("{a: [], b: , c: }", "name some, or write no value", "{a: , b: , c: }"),
        ("{a: [x, y], b: [x, z]}", "rename one, or drop it", "{a: [x, y], b: [w, z]}"),
        ("[x, y, x]", "drop one of them", "[x, y]"),
        ("{a: [x, b: c: d], e: }", "quote a name that holds a colon", "{a: [x, 'b: c: d'], e: }"),
        ("a:\n\t- x\nb:\n", "indented with spaces", "a:\n  - x\nb:\n"),
    ],
)  # fmt: skip
def test_trees(tmp_path: Path, wrong: str, fix: str, mended: str) -> None:
    path = tmp_path / "tree.yaml"
    path.write_text(wrong)
    refused(lambda: LabelTree.from_yaml(path), fix)
    path.write_text(mended)
    assert len(LabelTree.from_yaml(path).leaves) >= 2


@pytest.mark.parametrize(
    ("kind", "wrong", "fix", "mended"),
    [
        ("csv", "a,train\n", "begin the file with the line slide_id,split",
         "slide_id,split\na,train\nb,test\n"),
        ("csv", "slide_id,split\na,train\nb,x\n", "write a slide and train, val or test",
         "slide_id,split\na,train\nb,test\n"),
        ("csv", "slide_id,split\na,train\n", "complete the files",
         "slide_id,split\na,train\nb,test\n"),
        ("clam", ",train,training,test\n0,a,b,c\n", "remove one of the two columns",
         ",train,test\n0,a,c\n"),
        ("clam", ",train,val,test\na,True,False,True\nb,False,False,True\n", "keep it in one part",
         ",train,val,test\na,True,False,False\nb,False,False,True\n"),
    ],
)  # fmt: skip
def test_split_files(tmp_path: Path, kind: str, wrong: str, fix: str, mended: str) -> None:
    path = tmp_path / "splits_0.csv"
    path.write_text(wrong)
    refused(lambda: import_splits([path], kind), fix)
    path.write_text(mended)
    (fold,) = import_splits([path], kind).folds
    assert (fold.train, len(fold.test)) == (("a",), 1)


def test_a_column_of_folds_goes_into_the_label_file(tmp_path: Path) -> None:
    path = tmp_path / "folds.csv"
    path.write_text("slide_id,label,fold\n" + "".join(f"s{i},N,{i % 2}\n" for i in range(8)))
    refused(lambda: import_splits([path], "csv"), "belongs into the label file")
    assert len(make_folds(read_labels(path, TREE), 5, 0, 0.2)) == 2


def cohort(counts: dict[str, int]) -> list[Slide]:
    return [Slide(f"{n}{i}", n, f"{n}{i}") for n, count in counts.items() for i in range(count)]


def test_folds(tmp_path: Path) -> None:
    few = cohort({"N": 9, "IC": 3})
    refused(lambda: make_folds(few, 5, 0, 0.2), "use --folds 3")
    assert len(make_folds(few, 3, 0, 0.2)) == 3
    one = cohort({"N": 9, "IC": 1})
    refused(lambda: make_folds(one, 2, 0, 0.2), "leave its slides out")
    assert len(make_folds(one[:-1], 2, 0, 0.2)) == 2
    bare = cohort({"N": 2, "IC": 2})
    refused(lambda: make_folds(bare, 2, 0, 0.2), "name val slides in a split column")
    parts = ("train", "val", "train", "test")
    named = [Slide(s.slide_id, s.label, s.patient_id, p) for s, p in zip(bare, parts, strict=True)]
    assert make_folds(named, 2, 0, 0.2)[0].val == ("N1",)
    refused(lambda: make_folds(few, 1, 0, 0.2), "add a split column to the labels")
    no_test = [Slide(s.slide_id, s.label, s.patient_id, "train") for s in few]
    refused(lambda: make_folds(no_test, 3, 0, 0.2), "remove the column for cross-validation")
    assert make_folds(few, 3, 0, 0.2)
    again = [Slide(s.slide_id, s.label, s.patient_id, "0") for s in few]
    refused(lambda: make_folds(again, 3, 0, 0.2), "remove the column for cross-validation")
    path = tmp_path / "splits.json"
    refused(lambda: read_manifest(tmp_path), f"{tmp_path}/splits.json")
    write_splits(path, make_folds(few, 3, 0, 0.2), few)
    assert read_manifest(path).slides == few
    path.write_text(path.read_text().replace("N0", "N9"))
    refused(lambda: read_manifest(path), "train anew from the label file")


def test_names() -> None:
    refused(lambda: match_slides(["s1"], ["a/s1", "b/s1"]), "as one of these, letter by letter")
    assert match_slides(["a/s1"], ["a/s1", "b/s1"])
    refused(lambda: match_slides(["s1", "s1.svs"], ["s1"]), "keep one of the two lines")
    assert match_slides(["s1.svs"], ["s1"])
