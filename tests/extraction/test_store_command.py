"""Mending a store from the command line, and slides whose resolution was stated anew."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from hmil_fast.cli.main import main

Cli = Callable[..., "CompletedProcess[str]"]
pytestmark = pytest.mark.usefixtures("own_signals")
TILES = ("--tile-size", "96", "--mpp", "2")


@pytest.fixture(scope="module")
def stored(
    cli: Cli, slide_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of two slides, one of which states an implausible mpp, and their store."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "slides").mkdir()
    shutil.copy(slide_file("CMU-1-Small-Region.svs"), folder / "slides" / "good.svs")
    shutil.copy(slide_file("CMU-1-Small-Region.wrong-mpp.tiff"), folder / "slides" / "wrong.tiff")
    done = cli("extract", folder / "slides", "--store", folder / "s", *TILES, "--slide-mpp", "0.25")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_slide_mpp_is_for_slides_that_state_none(cli: Cli, stored: Path) -> None:
    slides = json.loads(cli("store", "info", stored / "s").stdout)["slide_ids"]
    assert slides["good"]["mpp"] == pytest.approx(0.499)
    assert slides["wrong"]["mpp"] == 0.25
    assert slides["good"]["tiles"] > 2 * slides["wrong"]["tiles"]


@pytest.mark.slow
def test_a_corrected_mpp_is_not_passed_over(cli: Cli, stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored / "s", tmp_path / "s")
    manifest = stored / "manifest.csv"
    again = ["extract", "--manifest", manifest, "--store", tmp_path / "s", *TILES]
    manifest.write_text("path,slide_id,mpp\nslides/good.svs,good,\nslides/wrong.tiff,wrong,0.499\n")
    refused = cli(*again)
    assert refused.returncode == 1
    assert "was extracted with 0.25 µm/px, you state 0.499" in refused.stdout
    assert f"store drop {tmp_path / 's'} wrong" in refused.stdout
    assert cli("store", "drop", tmp_path / "s", "wrong").returncode == 0
    assert cli(*again).returncode == 0
    slides = json.loads(cli("store", "info", tmp_path / "s").stdout)["slide_ids"]
    assert slides["wrong"]["mpp"] == 0.499


@pytest.mark.slow
def test_repair_drops_what_is_damaged_and_extract_makes_it_anew(
    cli: Cli, stored: Path, tmp_path: Path
) -> None:
    store = tmp_path / "s"
    shutil.copytree(stored / "s", store)
    shard = max((store / "slides" / "good").rglob("c/*/*"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    assert cli("store", "verify", store).returncode == 1
    assert "good: dropped" in cli("store", "repair", store).stdout
    again = cli("extract", stored / "slides", "--store", store, *TILES, "--slide-mpp", "0.25")
    assert "1 slides extracted" in again.stdout
    assert cli("store", "verify", store).returncode == 0


def test_dropping_needs_the_name_of_a_stored_slide(cli: Cli, stored: Path) -> None:
    for words, problem in (((), "no slide to drop"), (("nope",), "has no slide 'nope'")):
        done = cli("store", "drop", stored / "s", *words)
        assert done.returncode == 2
        assert problem in done.stderr


def test_sweep_says_what_is_too_young_and_takes_leases_that_outlived_their_slide(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "s"
    shutil.copytree(stored / "s", store)
    attempt = store / "slides" / "good" / f"a-{'0' * 32}.zarr"
    attempt.mkdir()
    for name in ("good.0", "undone.0"):
        (store / "leases" / name).write_text("{}")

    def sweep(*args: str) -> str:
        assert main(["store", "sweep", str(store), *args]) == 0
        return capsys.readouterr().out

    said = sweep("--delete")
    assert "0 abandoned attempts, 0 abandoned leases\n" in said
    assert "not counted: 1 attempts younger than 24 h" in said
    said = sweep("--older-than", "0")
    assert f"{attempt}\n{store}/leases/good.0\n" in said
    assert "1 abandoned attempts, 1 abandoned leases; delete them with --delete\n" in said
    assert "not counted" not in said
    sweep("--older-than", "0", "--delete")
    assert not attempt.exists()
    assert [path.name for path in (store / "leases").iterdir()] == ["undone.0"]


def test_a_path_that_does_not_exist_makes_no_store(cli: Cli, tmp_path: Path) -> None:
    done = cli("extract", tmp_path / "nowhere", "--store", tmp_path / "s")
    assert done.returncode == 2
    assert "does not exist" in done.stderr
    assert not (tmp_path / "s").exists()
