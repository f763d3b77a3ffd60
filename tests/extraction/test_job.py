"""A folder of good, odd and broken slides through the real command line."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from hmil_fast.cli.main import main

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
SlideFile = Callable[[str], Path]
CheckStore = Callable[[Path], dict[str, bytes]]

pytestmark = pytest.mark.usefixtures("own_signals")
TILES = ("--mpp", 2)  # few tiles, so that the commands are quick


@dataclass
class Table:
    """The slides of a job: what is good, and a word of what each bad one is told."""

    folder: Path
    good: list[str]
    bad: dict[str, str]


@dataclass
class Job:
    table: Table
    store: Path
    first: "subprocess.CompletedProcess[str]"


@pytest.fixture(scope="module")
def table(slide_file: SlideFile, tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("slides")
    svs, pyramid = slide_file("CMU-1-Small-Region.svs"), slide_file("cmu1_small_pyramid.tif")
    good, bad = ["CMU-1-Small-Region", "cmu1_small_pyramid"], {}
    shutil.copy(svs, folder)
    shutil.copy(pyramid, folder)
    shutil.copy(slide_file("CMU-1-Small-Region.wrong-mpp.tiff"), folder)
    bad["CMU-1-Small-Region.wrong-mpp"] = "0.00499 µm per px"
    shutil.copy(slide_file("cmu1_jpeg2000.svs"), folder)
    bad["cmu1_jpeg2000"] = "states no usable mpp"
    shutil.copy(slide_file("dapi_small.ndpi"), folder / "dapi.ndpi")
    good.append("dapi")
    shutil.copytree(slide_file("CMU-1-Small-Region-dicom"), folder / "series")
    bad["series"] = "YBR_FULL"
    (folder / "text.svs").write_text("not a slide\n" * 99)
    (folder / "empty.tif").touch()
    bad |= {"text": "no reader opens text.svs", "empty": "is empty (0 bytes)"}
    for path in (svs, pyramid):
        whole = path.read_bytes()
        for part in (0.0001, 0.3, 0.9, 0.999):
            name = f"{path.stem}-cut{part}"
            (folder / f"{name}{path.suffix}").write_bytes(whole[: int(part * len(whole))])
            bad[name] = "damaged or cut off"
    return Table(folder, good, bad)


@pytest.fixture(scope="module")
def job(table: Table, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Job:
    store = tmp_path_factory.mktemp("job") / "store"
    return Job(table, store, cli("extract", table.folder, "--store", store, *TILES))


def check_bad_slides(table: Table, done: "subprocess.CompletedProcess[str]") -> None:
    """One line each on stderr, and what and fix in the list on stdout."""
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("✗ ")]
    assert len(lines) == len(table.bad)
    listed = done.stdout.splitlines()
    for slide_id, word in table.bad.items():
        (line,) = (line for line in lines if line.startswith(f"✗ {slide_id}: "))
        assert word in line
        assert " Fix: " in line
        at = next(n for n, line in enumerate(listed) if line.startswith(f"  {slide_id}: "))
        assert word in listed[at]
        assert listed[at + 1].startswith("    Fix: ")


def test_good_slides_are_stored_and_bad_ones_named(job: Job, check_store: CheckStore) -> None:
    check_bad_slides(job.table, job.first)
    for slide_id in job.table.good:
        assert re.search(f"^[✓!] {slide_id}: ", job.first.stderr, re.M)  # "!": a dark background
    count = f"{len(job.table.good)} slides extracted"
    assert job.first.stdout.startswith(count)
    assert f"0 were done before, {len(job.table.bad)} failed" in job.first.stdout
    assert sorted(check_store(job.store)) == sorted(job.table.good)
    overlays = job.store / "overlays"
    drawn = {path.stem for path in overlays.iterdir()}
    assert set(job.table.good) <= drawn <= {*job.table.good, *job.table.bad}
    for path in overlays.iterdir():
        with Image.open(path) as picture:
            assert picture.format == "JPEG"
            assert min(picture.size) > 500
    (file,) = (job.store / "events").iterdir()
    log = [json.loads(line) for line in file.read_text().splitlines()]
    ended = [line for line in log if line["event"] in ("slide done", "slide failed")]
    errors = {line["slide_id"]: line.get("error") for line in ended}
    assert {name for name, error in errors.items() if error} == set(job.table.bad)
    assert errors.keys() - job.table.bad.keys() == set(job.table.good)


def test_again_only_the_bad_ones_are_tried(job: Job, cli: Cli, check_store: CheckStore) -> None:
    before = check_store(job.store)
    again = cli("extract", job.table.folder, "--store", job.store, *TILES)
    check_bad_slides(job.table, again)
    assert again.stdout.startswith("0 slides extracted, ")
    assert f"{len(job.table.good)} were done before" in again.stdout
    assert "✓" not in again.stderr
    assert check_store(job.store) == before
    assert main(["store", "verify", str(job.store)]) == 0


def test_other_tiles_do_not_go_into_the_same_store(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["extract", str(job.table.folder), "--store", str(job.store), "--mpp", "2"]
    assert main([*args, "--tile-size", "128"]) == 2
    said = capsys.readouterr()
    what, fix = said.err.splitlines()
    assert "tile_px" in what
    assert "128" in what
    assert "256" in what
    assert fix.startswith("Fix: ")
    assert said.out == ""


def test_mpp_by_flag_and_by_manifest(
    cli: Cli,
    slide_file: SlideFile,
    tmp_path: Path,
    check_store: CheckStore,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong, store = slide_file("CMU-1-Small-Region.wrong-mpp.tiff"), tmp_path / "store"
    args = ["extract", str(wrong), "--slide-mpp", "0.499", "--mpp", "2", "--store", str(store)]
    assert main(args) == 0
    assert capsys.readouterr().out.startswith("1 slides extracted")
    assert main(args) == 0
    assert "1 were done before, 0 failed" in capsys.readouterr().out
    rows = ["path,slide_id,mpp", f"{wrong},by manifest,0.499"]
    rows.append(f"{slide_file('cmu1_jpeg2000.svs')},,0.5")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    done = cli("extract", "--manifest", tmp_path / "list.csv", *TILES, "--store", store)
    assert done.returncode == 0, done.stderr
    found = {c["slide_id"]: c for c in map(json.loads, check_store(store).values())}
    one, two = (found[name] for name in ("CMU-1-Small-Region.wrong-mpp", "by manifest"))
    assert one["attrs"]["mpp"] == two["attrs"]["mpp"]
    assert one["attrs"]["mpp"]["level0"] == 0.499
    assert one["attrs"]["mpp"]["source"] == "user"
    assert one["content_digest"] == two["content_digest"]
    assert found["cmu1_jpeg2000"]["attrs"]["mpp"]["level0"] == 0.5
    assert found["cmu1_jpeg2000"]["num_tiles"] > 0


def test_a_slide_replaced_under_its_name_is_noticed(
    cli: Cli, slide_file: SlideFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, store = tmp_path / "slides", tmp_path / "a store"
    folder.mkdir()
    path = folder / "my slide.tif"
    whole = slide_file("cmu1_small_pyramid.tif").read_bytes()
    path.write_bytes(whole)
    args = ["extract", folder, "--store", store, *TILES]
    assert cli(*args).returncode == 0
    path.touch()  # the same bytes with a new date
    assert main([*map(str, args)]) == 0
    assert "1 were done before, 0 failed" in capsys.readouterr().out
    for other in (whole[:-1] + b"x", b"x" + whole[1:], whole + b"x"):
        path.write_bytes(other)
        assert main([*map(str, args)]) == 1
        out = capsys.readouterr().out
        assert "slide 'my slide' was extracted from my slide.tif of 1989612 bytes; " in out
    path.write_bytes(whole + b"x")
    fix = re.search("Fix: run `hmil-fast (.+)`, then extract", out)
    assert fix
    assert main(shlex.split(fix[1])) == 0
    assert main([*map(str, args)]) == 0


@pytest.mark.slow
def test_a_name_that_reads_like_markup(
    cli_process: Cli, slide_file: SlideFile, tmp_path: Path
) -> None:
    folder = tmp_path / "µ [red"
    folder.mkdir()
    shutil.copy(slide_file("cmu1_small_pyramid.tif"), folder / "].tif")
    (tmp_path / "[").mkdir()
    (tmp_path / "[" / "].tif").touch()
    store = tmp_path / "store"
    done = cli_process("extract", tmp_path, "--store", store, *TILES, PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    assert r"\u2713 \xb5 [red/]: " in done.stderr
    assert r"\u2717 [/]: ].tif is empty" in done.stderr
    assert "  [/]: ].tif is empty" in done.stdout


def test_doctor_as_json(table: Table, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(table.folder), "--mpp", "2", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    slides = {slide["slide_id"]: slide for slide in found["slides"]}
    assert slides.keys() == set(table.good) | table.bad.keys()
    for slide_id, word in table.bad.items():
        assert word in slides[slide_id]["error"]
        assert slides[slide_id]["fix"]
    cmu = slides["cmu1_small_pyramid"]
    assert (cmu["reader"], cmu["codec"], cmu["level"], cmu["tiles"]) == (
        "nvimagecodec",
        "jpeg",
        2,
        4,
    )
    assert cmu["bytes"] == 4 * (2 * 1280 + 9)
    assert cmu["error"] is None
    assert {finding["state"] for finding in found["machine"]} <= {"ok", "note", "bad"}


def test_a_dry_run_says_all_and_writes_nothing(table: Table, cli: Cli, tmp_path: Path) -> None:
    before = sorted(table.folder.rglob("*"))
    store = tmp_path / "deep" / "store"
    done = cli("extract", table.folder, *TILES, "--store", store, "--dry-run")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    for slide_id, word in table.bad.items():
        at = next(n for n, line in enumerate(lines) if line.startswith(f"✗ {slide_id}: "))
        assert word in lines[at]
        assert lines[at + 1].startswith("  Fix: ")
    for slide_id in table.good:
        (line,) = (line for line in lines if line[1:].startswith(f" {slide_id}: "))
        assert line[0] in "✓!"
        assert "µm/px from " in line
        assert " tiles, " in line
    assert list(tmp_path.iterdir()) == []
    assert sorted(table.folder.rglob("*")) == before


def test_a_dry_run_uses_the_jobs_own_weights(
    slide_file: SlideFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["extract", str(slide_file("cmu1_small_pyramid.tif")), "--mpp", "2", "--dry-run"]
    args += ["--store", str(tmp_path / "store")]
    assert main(args) == 0
    assert main([*args, "--weights", str(tmp_path / "none.pth")]) == 2
    assert "no weights file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
