"""Features that another tool made: trained on, drawn, and told from others."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from hmil_fast.cli.main import main
from hmil_fast.io.store import open_store
from hmil_fast.report.canvas import draw_on
from hmil_fast.runs.run import open_run


@pytest.fixture(scope="module")
def copies(cohort: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort's features exported as .npy, and imported with and without coordinates."""
    path = tmp_path_factory.mktemp("copies")
    export = ["store", "export", "--format", "npy"]
    assert main([*export, str(cohort.path / "store"), str(path / "npy")]) == 0
    shutil.copytree(path / "npy", path / "bare")
    for coords in (path / "bare").glob("*.coords.npy"):
        coords.unlink()
    for name in ("npy", "bare"):
        command = ["store", "import", "--format", "npy", str(path / name)]
        assert main([*command, str(path / f"{name}-store")]) == 0
    return path


def table(text: str) -> dict[str, str]:
    return {line.split(",")[0]: line for line in text.splitlines()[1:]}


@pytest.mark.parametrize("copy", ["npy-store", "bare-store"])
def test_a_copy_of_the_features_is_as_good_as_the_store(
    copy: str, run: Any, copies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(run.path), "--store", str(copies / copy)]) == 0
    said, (out, err) = table((run.path / "predictions.csv").read_text()), capsys.readouterr()
    found = table(out)
    assert found.keys() == said.keys()
    assert all(found[s].split(",")[:6] == said[s].split(",")[:6] for s in said)
    # the export leaves out tiles that could not be decoded
    assert "1 slides have other features than when" in err
    assert "was trained: s06" in err


@pytest.mark.slow
def test_a_run_goes_on_with_a_copy_of_its_features_and_not_with_others(
    cohort: Any, copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (cohort.path / "labels.csv").read_text().splitlines()
    whole = [line for line in lines if not line.startswith("s06")]
    (tmp_path / "labels.csv").write_text("\n".join(whole))
    shutil.copytree(copies / "npy-store", tmp_path / "mine")
    settings = ("model=mean", "baseline=none", "epochs=1", "folds=2", "device=cpu")

    def train(store: Path, *more: str) -> int:
        given = {"store": store, "labels": tmp_path / "labels.csv"}
        given |= {"tree": cohort.path / "tree.yaml", "out": tmp_path / "run"}
        return main(["train", *(f"--{k}={v}" for k, v in given.items()), *settings, *more])

    assert train(cohort.path / "store") == 0
    assert train(tmp_path / "mine") == 0
    assert "all 2 folds are trained already" in capsys.readouterr().err

    features = copies / "npy" / "s03.npy"
    changed = np.load(features)
    changed[0, 0] += 1
    shutil.copytree(copies / "npy", tmp_path / "npy")
    np.save(tmp_path / "npy" / "s03.npy", changed)
    assert main(["store", "drop", str(tmp_path / "mine"), "s03"]) == 0
    again = ["store", "import", "--format", "npy", str(tmp_path / "npy"), str(tmp_path / "mine")]
    assert main(again) == 0
    capsys.readouterr()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert train(tmp_path / "mine") == 2
    err = capsys.readouterr().err
    assert "was set up with other features of 1 slides, s03\nFix: give another --out" in err
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    # the fix
    assert train(tmp_path / "mine", "--overwrite") == 0
    (tmp_path / "run").rename(tmp_path / "new")
    assert open_run(tmp_path / "new").changed(cohort.store) == ["s03"]

    store, run = ["--store", str(cohort.path / "store")], str(tmp_path / "new")
    for command in (
        ["predict", run, *store],
        ["evaluate", run, *store],
        ["report", run, *store],
    ):
        capsys.readouterr()
        assert main(command) == 0
        assert "1 slides have other features than when" in capsys.readouterr().err, command


def test_features_of_another_encoder_are_refused_by_name(
    cohort: Any, copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("model=mean", "baseline=none", "epochs=1", "folds=2", "device=cpu")
    npy = ["store", "import", "--format", "npy"]
    assert main([*npy, str(copies / "npy"), str(tmp_path / "a"), "--encoder", "uni_v1"]) == 0
    for path in (copies / "npy").glob("s??.npy"):
        (tmp_path / "b.npy").mkdir(exist_ok=True)
        np.save(tmp_path / "b.npy" / path.name, -np.load(path))
    assert main([*npy, str(tmp_path / "b.npy"), str(tmp_path / "b"), "--encoder", "conch"]) == 0

    def train(store: str) -> int:
        given = {"store": tmp_path / store, "labels": cohort.path / "labels.csv"}
        given |= {"tree": cohort.path / "tree.yaml", "out": tmp_path / "run"}
        return main(["train", *(f"--{k}={v}" for k, v in given.items()), *settings])

    assert train("a") == 0
    capsys.readouterr()
    assert train("b") == 2
    err = capsys.readouterr().err
    assert "other store, features of 35 slides, s00, s01, s02, s03, s04" in err
    assert "(encoder.name is 'conch', was 'uni_v1')" in err
    assert main(["predict", str(tmp_path / "run"), "--store", str(tmp_path / "b")]) == 2
    err = capsys.readouterr().err
    assert "encoder.name is 'conch', was 'uni_v1'" in err
    assert "Fix: import features of these slides with --encoder uni_v1" in err
    # the same files, and two new ones, imported again with fewer facts
    for name in ("n0", "n1"):
        (tmp_path / "new").mkdir(exist_ok=True)
        np.save(tmp_path / "new" / f"{name}.npy", np.load(copies / "npy" / "s00.npy") + 1)
    assert main([*npy, str(tmp_path / "new"), str(tmp_path / "c"), "--encoder", "uni_v1"]) == 0
    assert main(["predict", str(tmp_path / "run"), "--store", str(tmp_path / "c")]) == 0


@pytest.mark.slow
def test_imported_slides_are_drawn_on_their_file_or_a_blank_sheet(
    run: Any, cohort: Any, copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(copies / "npy-store")
    blank, there = draw_on(store, "s00"), draw_on(cohort.store, "s00")
    assert not blank.real
    assert (blank.side, there.side) == (64, 64)
    assert blank.size == there.size
    assert len(blank.notes) == 2
    x, y = blank.coords[3]
    assert (blank.picture[y + 32, x + 32] == 222).all()

    command = ["heatmap", str(run.path), "s00", "--store", str(store.path), "--out"]
    assert main([*command, str(tmp_path / "blank.png")]) == 0
    err = capsys.readouterr().err
    assert "drawn on a blank sheet" in err
    assert "does not state the size of tiles" in err
    width, height = there.size
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    (tmp_path / "slides").mkdir()
    tifffile.imwrite(tmp_path / "slides" / "s00.tif", pixels, tile=(64, 64), photometric="rgb")
    slides = ["--slides", str(tmp_path / "slides")]
    assert main([*command, str(tmp_path / "real.png"), *slides, "--top-k", "2"]) == 0
    assert "blank" not in capsys.readouterr().err
    assert Image.open(tmp_path / "real.png").height > Image.open(tmp_path / "blank.png").height
    canvas = draw_on(store, "s00", tmp_path / "slides" / "s00.tif")
    assert canvas.real
    np.testing.assert_array_equal(canvas.picture, pixels)

    # a file that the tiles lie outside of
    tifffile.imwrite(tmp_path / "slides" / "s00.tif", pixels[:, :300], tile=(64, 64))
    assert main([*command, str(tmp_path / "x.png"), *slides]) == 2
    assert "'s00' in the store has tiles at up to 448, " in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.slow
def test_the_report_shows_imported_slides(
    run: Any, copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    report = ["report", str(tmp_path / "run"), "--heatmaps", "2", "--store"]
    assert main([*report, str(copies / "npy-store")]) == 0
    err = capsys.readouterr().err
    assert err.count("blank sheet") == 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count('class="look"') == 2
    assert main([*report, str(copies / "bare-store")]) == 0
    err = capsys.readouterr().err
    assert re.search(r"not shown, with no coordinates: (s\d\d, ){5}… \(35 slides\)", err)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["none", "some", "kind"])
def test_a_wrong_store_does_not_touch_a_good_report(
    what: str,
    run: Any,
    cohort: Any,
    copies: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    command = ["report", str(tmp_path / "run")]
    assert main([*command, "--store", str(cohort.path / "store"), "--heatmaps", "2"]) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for name in ("s01", "s02"):
        x = np.load(copies / "npy" / f"{name}.npy")
        to = tmp_path / "npy" / f"{'x' * (what == 'none')}{name}.npy"
        to.parent.mkdir(exist_ok=True)
        np.save(to, x[:, :8] if what == "kind" else x)
    wrong = str(tmp_path / "wrong")
    assert main(["store", "import", "--format", "npy", str(to.parent), wrong]) == 0
    capsys.readouterr()
    assert main([*command, "--store", wrong]) == 2
    err = capsys.readouterr().err
    if what == "some":
        assert "lacks 34 of the 36 slides" in err
        assert "--allow-missing writes the report without these slides" in err
    else:
        assert "dim is 8, was 16" in err if what == "kind" else "of the kind" in err
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    if what == "some":
        assert main([*command, "--store", wrong, "--allow-missing"]) == 0
