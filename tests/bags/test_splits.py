"""Label files as people write them, folds without leaks, and the manifest."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from hmil_fast.bags.splits import Fold, Slide, make_folds, read_labels, read_splits, write_splits
from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree

TREE = LabelTree.from_nested({"benign": ["N", "PB"], "malignant": ["IC"]})


def labels(tmp_path: Path, text: str | bytes) -> list[Slide]:
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_labels(path, TREE)


def cohort(counts: dict[str, int], slides_each: tuple[int, ...] = (1, 2, 1)) -> list[Slide]:
    """Per label so many patients, with 1, 2, 1, 1, 2, 1… slides."""
    slides = []
    for label, patients in counts.items():
        for number in range(patients):
            pieces = range(slides_each[number % len(slides_each)])
            slides += [Slide(f"{label}-{number}-{i}", label, f"{label}-{number}") for i in pieces]
    return slides


def test_reads_plain_and_full_files(tmp_path: Path) -> None:
    assert labels(tmp_path, "slide_id,label\na,N\nb,IC\n") == [
        Slide("a", "N", "a"),
        Slide("b", "IC", "b"),
    ]
    full = "patient_id,extra,slide_id,split,label\nP1,x,a,train,N\nP2,y,b,Test,IC\n"
    assert labels(tmp_path, full) == [
        Slide("a", "N", "P1", "train"),
        Slide("b", "IC", "P2", "test"),
    ]


def test_spreadsheet_habits_do_not_matter(tmp_path: Path) -> None:
    text = '\ufeffSlide_ID , label\r\n\r\n "a, left" ,N\r\n"b ""2""", IC \r\n,\r\n'
    # a quote after a space is no quote in CSV, so the first field is written without the space
    text = text.replace(' "a', '"a').replace('left" ', 'left"')
    assert [(s.slide_id, s.label) for s in labels(tmp_path, text)] == [
        ("a, left", "N"),
        ('b "2"', "IC"),
    ]


TABLES = Path(__file__).parent.parent / "data" / "tables"
FLAT = LabelTree.from_nested(["n", "m"])
THREE = LabelTree.from_nested({"benign": ["n", "b"], "malignant": ["m"]})


def test_clams_own_header_names_patients() -> None:
    said: list[str] = []
    got = read_labels(TABLES / "clam.csv", FLAT, say=said.append)
    assert got == read_labels(TABLES / "clam_right.csv", FLAT)
    assert said == [f"{TABLES / 'clam.csv'}: column 'case_id' is read as patient_id"]
    for fold in make_folds(got, 5, 0, 0.2):
        patients = [{i[:12] for i in part} for part in (fold.train, fold.val, fold.test)]
        assert sum(map(len, patients)) == 40


def test_barcodes_name_patients_where_no_column_does(tmp_path: Path) -> None:
    text = (TABLES / "clam.csv").read_text().splitlines()
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(line.split(",", 1)[1] for line in text))
    said: list[str] = []
    assert read_labels(path, FLAT, say=said.append) == read_labels(TABLES / "clam.csv", FLAT)
    assert "read from the TCGA barcodes" in said[0]
    path.write_text("slide_id,label\na,n\nTCGA-AA-0000-01Z,m\n")
    assert read_labels(path, FLAT, say=said.append)[0].patient_id == "a"
    assert "every slide counts as a patient" in said[1]


def test_a_patient_written_in_two_ways_is_one(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("slide_id,label,case\na,n,P1\nb,m,p1\nc,m,7.0\nd,m,007\ne,m,8\n")
    said: list[str] = []
    got = read_labels(path, FLAT, say=said.append)
    assert [s.patient_id for s in got] == ["P1", "P1", "7", "7", "8"]
    assert "2 patients are written in two ways and are one: 'p1' and 'P1'" in said[1]


def test_a_column_that_groups_more_slides_is_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("slide_id,label,patient_id,case_id\na,n,1,P\nb,m,2,P\nc,m,3,Q\n")
    said: list[str] = []
    assert [s.patient_id for s in read_labels(path, FLAT, say=said.append)] == ["1", "2", "3"]
    assert said[0] == f"{path}: 'case_id' could be patient_id too; 'patient_id' is used"
    assert said[1] == (
        f"{path}: 1 of 'case_id' have several 'patient_id', such as 'P': if that is the patient, "
        "remove the column 'patient_id'"
    )
    path.write_text("slide_id,label,case_id\na,n,P\nb,m,P\nc,m,Q\n")  # the fix, followed
    assert [s.patient_id for s in read_labels(path, FLAT)] == ["P", "P", "Q"]


def test_a_column_set_is_the_official_split() -> None:
    said: list[str] = []
    got = read_labels(TABLES / "bracs_set.csv", THREE, say=said.append)
    assert said == [f"{TABLES / 'bracs_set.csv'}: column 'Set' is read as split"]
    assert Counter(s.split for s in got) == {"train": 36, "val": 12, "test": 12}
    (fold,) = make_folds(got, 5, 0, 0.2)
    assert [len(part) for part in (fold.train, fold.val, fold.test)] == [36, 12, 12]


def test_a_column_of_fold_numbers_is_the_folds(tmp_path: Path) -> None:
    said: list[str] = []
    got = read_labels(TABLES / "fold.csv", THREE, say=said.append)
    assert "fold names the folds that test the slides: 0, 1, 2, 3, 4" in said[1]
    folds = make_folds(got, 2, 0, 0.2)
    assert [set(f.test) for f in folds] == [
        {s.slide_id for s in got if s.split == str(k)} for k in range(5)
    ]
    assert all(f.val and len(f.train) + len(f.val) == 48 for f in folds)
    path = tmp_path / "labels.csv"
    path.write_text("slide_id,label,patient_id,split\na,n,P,0.0\nb,m,P,1.0\n")
    with pytest.raises(UsageError, match=r"line 3: .*'P' is in split 1.0 here and in 0.0 on line"):
        read_labels(path, FLAT)
    path.write_text("slide_id,label,k-fold\na,n,Fold 10\nb,m,fold_9\n")
    assert [s.split for s in read_labels(path, FLAT)] == ["10", "9"]
    path.write_text("slide_id,label,fold\na,n,3\nb,m,3\n")
    with pytest.raises(UsageError, match="names one fold only"):
        make_folds(read_labels(path, FLAT), 2, 0, 0.2)
    path.write_text("slide_id,label,fold\na,n,3\nb,m,x\n")
    with pytest.raises(UsageError, match="line 3: fold is 'x', elsewhere a number such as '3'"):
        read_labels(path, FLAT)


def test_a_semicolon_and_an_empty_split_do_not_matter(tmp_path: Path) -> None:
    assert read_labels(TABLES / "semicolon.csv", THREE)[59].patient_id == "ps059"
    path = tmp_path / "labels.csv"
    path.write_text("slide_id;label;Split\na;n;\nb;m;NaN\n")
    said: list[str] = []
    assert [s.split for s in read_labels(path, FLAT, say=said.append)] == [None, None]
    assert f"{path}: Split is empty in every line and not used" in said


def test_labels_in_other_letters_are_read_and_named(tmp_path: Path) -> None:
    tree = LabelTree.from_nested({"Low": ["1", "2"], "High": ["3", "e\u0301"]})
    path = tmp_path / "labels.csv"
    path.write_text("slide_id,label\na,1.0\nb,\u00c9\nc,2\n", encoding="utf-8")
    said: list[str] = []
    assert [s.label for s in read_labels(path, tree, say=said.append)] == ["1", "\u00e9", "2"]
    assert "labels are read as nodes of the tree: '1.0' as '1'" in said[0]
    tree = LabelTree.from_nested(["a", "A", "b"])
    path.write_text("slide_id,label\nx,a\ny,A\n")
    assert [s.label for s in read_labels(path, tree)] == ["a", "A"]


def test_inner_nodes_are_counted_and_left_out_on_demand(tmp_path: Path) -> None:
    path = TABLES / "coarse.csv"
    with pytest.raises(UsageError) as caught:
        read_labels(path, THREE)
    assert "1 of 60 slides have a label that is an inner node of the tree" in caught.value.what
    assert "1 'benign' (its leaves: n, b)" in caught.value.what
    assert "--leaves-only" in caught.value.fix
    said: list[str] = []
    assert len(read_labels(path, THREE, say=said.append, leaves_only=True)) == 59
    assert said[0].endswith("1 'benign' (its leaves: n, b); they are left out")
    only = tmp_path / "labels.csv"
    only.write_text("slide_id,label\na,benign\n")
    for leaves_only in (False, True):
        with pytest.raises(UsageError, match="1 of 1 slides") as caught:
            read_labels(only, THREE, leaves_only=leaves_only)
        assert "evaluate" in caught.value.fix


def test_inner_nodes_are_labels_where_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("slide_id,label\na,N\nb,benign\nc,malignant\n")
    assert [s.label for s in read_labels(path, TREE, inner=True)] == ["N", "benign", "IC"]
    path.write_text("slide_id,label\na,N\nb,bengin\n")
    with pytest.raises(UsageError, match="line 3: label 'bengin' is not a leaf"):
        read_labels(path, TREE, inner=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\na,N\n", "line 1: no column slide_id"),
        ("slide_id\na\n", "line 1: no column label"),
        ("", "line 1: no column slide_id"),
        ("slide_id,label,label\na,N,N\n", "line 1: two columns named label"),
        ("slide_id label\na N\n", "line 1: no column slide_id"),
        ("slide_id,label\n", "names no slides"),
        ("slide_id,label\na,N\n,IC\n", "line 3: slide_id is empty"),
        ("slide_id,label\na\n", "line 2: label is empty"),
        ("slide_id,label,patient_id\na,N,\n", "line 2: patient_id is empty"),
        ("slide_id,label,patient_id\na,N,NA\nb,N,NA\n", r"line 2: patient_id is empty \(NA\)"),
        ("slide_id,label\na,N\nb,IC\na,N\n", "line 4: slide_id 'a' is already on line 2"),
        ("slide_id,label\na,n1\n", r"line 2: label 'n1' is not a leaf .*leaves: N, PB, IC"),
        (
            "slide_id,label\na,benign\n",
            r"1 of 1 slides have .* inner node .*: 1 'benign' \(its leaves: N, PB\)",
        ),
        ("slide_id,label\na,b,N\n", "line 2: 3 fields where the header has 2"),
        ("slide_id,label,split\na,N,A\n", "line 2: split 'A' is none of"),
        ("slide_id,label,split\na,N,train\nb,N,\n", "line 3: split is empty"),
        (
            "slide_id,label,patient_id,split\na,N,P,train\nb,N,P,test\n",
            "line 3: patient_id 'P' is in split test here and in train on line 2",
        ),
        (b"slide_id,label\n\xff\x81,N\n", "not UTF-8"),
        ("slide_id,label\n" + "a" * 200_000 + ",N\n", "line 2: field larger"),
    ],
)
def test_a_faulty_file_is_refused_by_line_and_field(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        labels(tmp_path, text)
    assert "labels.csv" in caught.value.what
    assert caught.value.fix


def test_line_numbers_count_quoted_line_breaks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 4: label 'X'"):
        labels(tmp_path, 'slide_id,label\n"a\nb",N\nc,X\n')


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.csv"):
        read_labels(tmp_path / "nowhere.csv", TREE)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_every_slide_is_tested_once_and_no_patient_leaks(k: int) -> None:
    slides = cohort({"N": 20, "PB": 12, "IC": 7})
    patient = {s.slide_id: s.patient_id for s in slides}
    label = {s.slide_id: s.label for s in slides}
    folds = make_folds(slides, k, seed=1, val_fraction=0.2)
    assert len(folds) == k
    assert Counter(i for f in folds for i in f.test) == Counter(s.slide_id for s in slides)
    for fold in folds:
        parts = [{patient[i] for i in part} for part in (fold.train, fold.val, fold.test)]
        assert len(set.union(*parts)) == sum(map(len, parts))
        assert len(fold.train) + len(fold.val) + len(fold.test) == len(slides)
        for part in (fold.train, fold.test):
            assert {label[i] for i in part} == {"N", "PB", "IC"}


def test_folds_are_stratified() -> None:
    slides = cohort({"N": 60, "PB": 30, "IC": 10}, (1,))
    for fold in make_folds(slides, 5, seed=0, val_fraction=0.25):
        label = {s.slide_id: s.label for s in slides}
        assert Counter(label[i] for i in fold.test) == {"N": 12, "PB": 6, "IC": 2}
        assert Counter(label[i] for i in fold.val) == {"N": 12, "PB": 6, "IC": 2}


def test_seed_decides_the_folds() -> None:
    slides = cohort({"N": 12, "PB": 12, "IC": 12})
    first, again, other = (make_folds(slides, 3, seed, 0.2) for seed in (4, 4, 5))
    assert first == again
    assert first != other


def test_a_patient_who_alone_carries_a_class_is_kept_for_training() -> None:
    slides = cohort({"N": 10, "PB": 10, "IC": 2}, (1,))
    for seed in range(10):
        for fold in make_folds(slides, 2, seed, 0.2):
            assert any(i.startswith("IC") for i in fold.train)
            assert fold.val


def test_rare_classes_do_not_prevent_a_validation_part() -> None:
    # each fold trains on one patient of N, one of PB and two of IC: only IC can spare one
    for fold in make_folds(cohort({"N": 2, "PB": 2, "IC": 4}, (1,)), 2, 0, 0.2):
        assert [i.split("-")[0] for i in fold.val] == ["IC"]


def test_no_validation_when_not_asked_for() -> None:
    folds = make_folds(cohort({"N": 4, "IC": 4}), 2, 0, 0)
    assert all(f.val == () for f in folds)


def test_a_rare_class_is_named_with_counts_and_fix() -> None:
    with pytest.raises(UsageError, match=r"'IC' has 3 patients \(4 slides\).* 5 folds") as caught:
        make_folds(cohort({"N": 9, "IC": 3}), 5, 0, 0.2)
    assert "--folds 3" in caught.value.fix
    with pytest.raises(UsageError, match="'IC' has 1 patients") as caught:
        make_folds(cohort({"N": 9, "IC": 1}), 2, 0, 0.2)
    assert "add patients" in caught.value.fix


def test_too_few_patients_for_a_validation_part_is_said() -> None:
    with pytest.raises(UsageError, match="held back for validation") as caught:
        make_folds(cohort({"N": 2, "IC": 2}, (1,)), 2, 0, 0.2)
    assert "val_fraction" not in caught.value.fix  # no run goes without validation slides


@pytest.mark.parametrize(("k", "fraction"), [(1, 0.2), (0, 0.2), (3, -0.1), (3, 0.9)])
def test_senseless_settings_are_refused(k: int, fraction: float) -> None:
    with pytest.raises(UsageError):
        make_folds(cohort({"N": 9, "IC": 9}), k, 0, fraction)


def official(parts: dict[str, int]) -> list[Slide]:
    return [
        Slide(f"{part}{i}", ("N", "IC")[i % 2], f"{part}{i}", part)
        for part, n in parts.items()
        for i in range(n)
    ]


def test_official_split_is_one_fold() -> None:
    (fold,) = make_folds(official({"train": 6, "val": 2, "test": 3}), 5, 0, 0.2)
    assert fold.train == tuple(f"train{i}" for i in range(6))
    assert fold.val == ("val0", "val1")
    assert fold.test == ("test0", "test1", "test2")


def test_official_split_without_validation_gets_one_from_training() -> None:
    (fold,) = make_folds(official({"train": 20, "test": 3}), 5, 0, 0.2)
    assert len(fold.val) == 4
    assert set(fold.train) | set(fold.val) == {f"train{i}" for i in range(20)}
    assert not set(fold.train) & set(fold.val)


@pytest.mark.parametrize("missing", ["train", "test"])
def test_official_split_needs_train_and_test(missing: str) -> None:
    parts = {"train": 6, "val": 4, "test": 4}
    del parts[missing]
    with pytest.raises(UsageError, match=f"no {missing} slides"):
        make_folds(official(parts), 5, 0, 0.2)


def test_manifest_round_trip_and_change(tmp_path: Path) -> None:
    slides = [*cohort({"N": 6, "IC": 6}), Slide("ü/<b>", "PB", "p1"), Slide("x", "PB", "p2")]
    folds = make_folds(slides, 2, 0, 0.25)
    path = tmp_path / "splits.json"
    write_splits(path, folds, slides)
    assert read_splits(path) == (folds, slides)
    assert [p.name for p in tmp_path.iterdir()] == ["splits.json"]

    data = json.loads(path.read_text())
    data["folds"][0]["train"].append(data["folds"][0]["test"].pop())
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match="changed after it was written"):
        read_splits(path)


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ([Fold(("a",), ("a",), ("c",))], "slide 'a' in train and in val"),
        ([Fold(("a",), (), ("b",))], "patient 'P' in train and in test"),
        ([Fold(("a", "zz"), (), ("c",))], "slide 'zz', which has no label"),
        ([Fold(("a",), ("c",), ())], "fold 0 has no test slides"),
        ([], "has no folds"),
    ],
)
def test_leaks_are_refused(tmp_path: Path, folds: list[Fold], message: str) -> None:
    slides = [Slide("a", "N", "P"), Slide("b", "N", "P"), Slide("c", "IC", "Q")]
    with pytest.raises(UsageError, match=message):
        write_splits(tmp_path / "splits.json", folds, slides)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"slides": 3, "folds": []}', '{"slides": [{}], "folds": []}', "[" * 9999],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "splits.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"splits\.json is not a split manifest"):
        read_splits(path)


def test_manifests_of_the_first_version_are_read_and_newer_ones_are_not(tmp_path: Path) -> None:
    content = {
        "slides": [{"slide_id": s, "label": "N", "patient_id": s, "split": None} for s in "ab"],
        "folds": [{"train": ["a"], "val": [], "test": ["b"]}],
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"version": 1, "sha256": sha256, **content}))
    assert read_splits(path) == (
        [Fold(("a",), (), ("b",))],
        [Slide("a", "N", "a"), Slide("b", "N", "b")],
    )
    content["folds"] = [{"train": ["a", "b"], "val": [], "test": ["b"]}]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    leaking = {"sha256": hashlib.sha256(text.encode()).hexdigest(), **content}
    path.write_text(json.dumps({"version": 1, **leaking}))
    with pytest.raises(UsageError, match="slide 'b' in train and in test"):
        read_splits(path)
    path.write_text(json.dumps({"version": 9, "sha256": sha256, "made_from": {}, **content}))
    with pytest.raises(UsageError, match="version 9, newer than this"):
        read_splits(path)
