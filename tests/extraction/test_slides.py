"""Which slides a command line and a manifest name, and what each wrong line of one is told."""

import csv
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hmil_fast.errors import SlideError, UsageError
from hmil_fast.extraction.prepare import prepare_slide
from hmil_fast.extraction.slides import SlideTask, collect_slides
from hmil_fast.io.tiles.grid import TileSpec

SlideFile = Callable[[str], Path]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def ids(tasks: list[SlideTask]) -> list[str]:
    return [task.slide_id for task in tasks]


def test_a_folder_is_searched_through(tmp_path: Path) -> None:
    touch(
        tmp_path / "b.svs",
        tmp_path / "sub" / "deep" / "a.TIF",
        tmp_path / "a.ndpi",
        tmp_path / "._a.ndpi",
        tmp_path / "notes.txt",
        tmp_path / "b.svs.part",
    )
    (tmp_path / "folder.svs").mkdir()
    tasks = collect_slides([str(tmp_path)])
    assert ids(tasks) == ["a", "b", "sub/deep/a"]
    assert [task.path for task in tasks] == [
        tmp_path / "a.ndpi", tmp_path / "b.svs", tmp_path / "sub" / "deep" / "a.TIF"
    ]  # fmt: skip
    assert {task.mpp for task in tasks} == {None}
    stated = collect_slides([str(tmp_path)], slide_mpp=0.25)
    assert {(task.mpp, task.fallback_mpp) for task in stated} == {(None, 0.25)}


def test_files_globs_and_the_same_file_twice(tmp_path: Path) -> None:
    touch(tmp_path / "x1.svs", tmp_path / "x2.svs", tmp_path / "y.svs", tmp_path / "deep" / "z.svs")
    pattern = str(tmp_path / "x*.svs")
    assert ids(collect_slides([pattern, str(tmp_path / "x2.svs")])) == ["x1", "x2"]
    assert ids(collect_slides([str(tmp_path / "**" / "*.svs")])) == ["z", "x1", "x2", "y"]
    assert ids(collect_slides([str(tmp_path), str(tmp_path / "y.svs")])) == [
        "deep/z", "x1", "x2", "y"
    ]  # fmt: skip
    touch(tmp_path / "odd[1].svs")  # a file, although it reads like a pattern
    assert ids(collect_slides([str(tmp_path / "odd[1].svs")])) == ["odd[1]"]


def test_dicom_series_are_one_slide_each(slide_file: SlideFile, tmp_path: Path) -> None:
    series = slide_file("CMU-1-Small-Region-dicom")
    shutil.copytree(series, tmp_path / "one")
    shutil.copytree(series, tmp_path / "two" / "series")
    tasks = collect_slides([str(tmp_path)])
    assert ids(tasks) == ["one", "two/series"]
    largest = max(series.iterdir(), key=lambda file: file.stat().st_size).name
    assert {task.path.name for task in tasks} == {largest}
    (only,) = collect_slides([str(tmp_path / "one")])
    assert only.path == tmp_path / "one" / largest


def told(*inputs: Path | str) -> tuple[list[str], list[str]]:
    """Ids of slides and what is said beside."""
    said: list[str] = []
    return ids(collect_slides(list(map(str, inputs)), tell=said.append)), said


def test_files_that_differ_in_their_suffix_keep_it_all_at_once(tmp_path: Path) -> None:
    names = [f"sub/{stem}{suffix}" for stem in "abcdefg" for suffix in (".svs", ".tif")]
    touch(*(tmp_path / name for name in [*names, "one.svs"]))
    found, (said,) = told(tmp_path)
    assert found == ["one", *names]
    assert said == (
        "7 groups of files differ only in their suffix, which their ids keep: "
        + "; ".join(f"sub/{stem} (.svs, .tif)" for stem in "abcde")
        + "; …"
    )
    assert told(tmp_path)[0] == found


def test_slides_with_one_id_are_all_named(tmp_path: Path) -> None:
    touch(*(tmp_path / folder / f"{name}.svs" for folder in "xy" for name in "abc"))
    with pytest.raises(UsageError) as caught:
        collect_slides([str(tmp_path / "x"), str(tmp_path / "y")])
    for name in "abc":
        paths = f"{tmp_path}/x/{name}.svs and {tmp_path}/y/{name}.svs"
        assert f"the id {name!r}: {paths}" in caught.value.what
    assert "name the folder above" in caught.value.fix
    assert len(ids(collect_slides([str(tmp_path)]))) == 6  # the fix, followed


def test_ids_that_people_read_as_one(tmp_path: Path) -> None:
    touch(tmp_path / "A.svs", tmp_path / "a.svs", tmp_path / "\u00e9.svs", tmp_path / "e\u0301.svs")
    if len(list(tmp_path.iterdir())) < 4:
        pytest.skip("this disk takes such names for one")
    found, (said,) = told(tmp_path)
    assert len(found) == 4
    assert said.startswith("ids of 2 groups differ only in case or in how letters are encoded")
    assert "'A' and 'a'" in said


def test_what_a_folder_holds_beside_slides_is_said(tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "out"
    touch(
        *(folder / name for name in ("a.svs", "b.txt", "c.txt", "README", "a.svs.part")),
        *(folder / name for name in (".hidden.svs", ".trash/old.svs", "m.mrxs", "m/Data.dat")),
        outside / "more.svs",
    )
    (folder / "dead.svs").symlink_to(outside / "gone.svs")
    (folder / "linked").symlink_to(outside)
    (folder / "live.svs").symlink_to(outside / "more.svs")
    os.mkfifo(folder / "pipe.tif")
    found, (said,) = told(folder)
    assert found == ["a", "live", "m"]
    left, parts = said.split(": ", 1)
    assert left == f"not taken from {folder}"
    assert set(parts.split("; ")) == {
        "4 files of another kind (2 .txt, 1 no suffix, 1 .part)",
        "1 hidden folder (.trash)",
        "1 hidden file (.hidden.svs)",
        "1 dead link (dead.svs)",
        "1 linked folder, to be named too (linked)",
        "1 pipe or socket (pipe.tif)",
    }
    assert told(folder, folder / "linked")[0] == ["a", "live", "m", "more"]
    assert told(outside) == (["more"], [])
    with pytest.raises(UsageError, match=r"no slide found in .*; not taken from .*1 \.dat"):
        told(folder / "m")


def test_a_pattern_says_which_folders_it_left_out(tmp_path: Path) -> None:
    touch(tmp_path / "a.svs", tmp_path / "sub" / "b.svs")
    (tmp_path / "dead.svs").symlink_to(tmp_path / "gone.svs")
    found, (said,) = told(tmp_path / "*")
    assert found == ["a", "dead"]  # the dead link fails by itself, with its line
    assert said.startswith("1 folder that ")


def test_two_slides_in_one_folder_of_dicom(slide_file: SlideFile, tmp_path: Path) -> None:
    both = shutil.copytree(slide_file("dicom-two-slides"), tmp_path / "both")
    (tmp_path / "one").mkdir()
    shutil.copy(both / "a1.dcm", tmp_path / "one")
    assert told(tmp_path) == (["both/a1", "both/b1", "one"], [])
    assert told(both) == (["a1", "b1"], [])
    for task in collect_slides([str(both)], slide_mpp=1.0):
        with prepare_slide(task, TileSpec(mpp=2)).reader as reader:
            assert reader.info.level_dimensions == ((512, 640),)
    # a label of the first slide that is larger than its image, and what is of no slide
    label = (both / "a1.dcm").read_bytes().replace(b"\\VOLUME\\", b"\\LABEL \\") + b"\0" * 100_000
    (both / "label.dcm").write_bytes(label)
    (both / "text.dcm").write_bytes(b"not DICOM")
    found, (said,) = told(both)
    assert found == ["a1", "b1"]
    assert "1 file that DICOM readers refuse (text.dcm)" in said
    found, (said,) = told(both / "[ab]*.dcm", both / "label.dcm")
    assert found == ["a1", "b1"]
    assert said.startswith("1 DICOM files are parts of slides that are taken: ")
    for name in "ab":
        (both / f"{name}1.dcm").unlink()
    assert told(both)[0] == ["label"]  # fails by itself, with its line


def test_nothing_found(tmp_path: Path) -> None:
    for inputs in ([], [str(tmp_path)], [str(tmp_path / "*.svs")]):
        with pytest.raises(UsageError, match=r"no slide found in .+\nFix: name slide files"):
            collect_slides(inputs)


def test_a_missing_file_fails_alone(tmp_path: Path) -> None:
    touch(tmp_path / "there.svs")
    tasks = collect_slides([str(tmp_path / "gone.svs"), str(tmp_path / "there.svs")])
    assert ids(tasks) == ["gone", "there"]
    with pytest.raises(SlideError, match=r"gone\.svs does not exist"):
        prepare_slide(tasks[0], TileSpec())


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_a_name_that_is_no_text(slide_file: SlideFile, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"a\xff.tif")
    shutil.copy(slide_file("cmu1_small_pyramid.tif"), path)
    (task,) = collect_slides([str(tmp_path)])
    with pytest.raises(SlideError, match="not UTF-8"):
        prepare_slide(task, TileSpec())


def manifest(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "list.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_manifest(tmp_path: Path) -> None:
    rows = [
        "\ufeffpath, slide_id, mpp, note",  # as Excel writes it
        "a.svs, patient 1, 0.25, good",
        "",
        "sub/b.tif, , ,",
        f"{tmp_path}/elsewhere/c.svs,,",
        "series/0001.dcm,,0.5,",
        '"comma, inside.svs",,,',
    ]
    tasks = collect_slides([], manifest(tmp_path, "\r\n".join(rows)), slide_mpp=1.0)
    assert tasks == [
        SlideTask("patient 1", tmp_path / "a.svs", 0.25, 1.0),
        SlideTask("sub/b", tmp_path / "sub" / "b.tif", None, 1.0),
        SlideTask("c", tmp_path / "elsewhere" / "c.svs", None, 1.0),
        SlideTask("series", tmp_path / "series" / "0001.dcm", 0.5, 1.0),
        SlideTask("comma, inside", tmp_path / "comma, inside.svs", None, 1.0),
    ]


def test_a_manifest_by_other_names_and_in_other_letters(tmp_path: Path) -> None:
    touch(tmp_path / "Pra\u0308parat.svs", tmp_path / "\u00b5.svs")
    path = tmp_path / "list.csv"
    text = "Filename;Slide;MPP;stain\nPr\u00e4parat.svs;a;0,25;HE\n\u00b5.svs;;;\n"
    path.write_bytes(text.encode("cp1252"))
    said: list[str] = []
    assert collect_slides([], path, tell=said.append) == [
        SlideTask("a", tmp_path / "Pra\u0308parat.svs", 0.25),
        SlideTask("\u00b5", tmp_path / "\u00b5.svs"),
    ]
    assert said == [
        f"{path} is not UTF-8; it is read as Windows-1252 (Latin-1)",
        f"{path}: column 'Filename' is read as path",
        f"{path}: column 'Slide' is read as slide_id",
        f"{path}: columns not used: stain",
    ]


def test_manifest_beside_files(tmp_path: Path) -> None:
    touch(tmp_path / "x.svs")
    listed = manifest(tmp_path, "path\ny.svs\n")
    assert ids(collect_slides([str(tmp_path)], listed)) == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name;mpp\na.svs;0.5\n", r"no column path \(columns: name, mpp\)"),
        ("", r"no column path"),
        ("path,mpp\na.svs,0.5\n\n,0.5\n", r"line 4: path is empty"),
        ("path,mpp\na.svs,abc\n", r"line 2: mpp is 'abc'"),
        ("path\ns3://b/a.svs\n", r"line 2: 's3://b/a.svs' is a URL"),
        ("path,mpp\n\n\na.svs,-1\n", r"line 4: mpp is '-1'"),
        ("path,mpp\na.svs,nan\n", r"line 2: mpp is 'nan'"),
        ("path,mpp\na.svs,inf\n", r"line 2: mpp is 'inf'"),
        ("path,mpp\na.svs,0,5\n", r"line 2: 3 fields where the header has 2"),
        ("path,slide_id\na.svs,x\nb.svs,x\n", r"the id 'x': .*a\.svs and .*b\.svs"),
        ("path\n" + "a" * (csv.field_size_limit() + 1), r"line \d: field larger than"),
        ("path\n", r"no slide found in .*list\.csv"),
    ],
)
def test_wrong_manifests(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        collect_slides([], manifest(tmp_path, text))
    assert "list.csv" in caught.value.what or "the id 'x'" in caught.value.what
    assert caught.value.fix
    assert "\n" not in caught.value.what


def test_manifests_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "book.csv").write_bytes(b"PK\x03\x04")
    for path in (tmp_path / "none.csv", tmp_path, tmp_path / "book.csv"):
        with pytest.raises(UsageError, match=r"cannot read|is a spreadsheet"):
            collect_slides([], path)
