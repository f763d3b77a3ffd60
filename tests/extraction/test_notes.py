"""What people are told of slides where tissue may be found wrong, and that the fix helps."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from hmil_fast.cli.main import main
from hmil_fast.extraction.jobs.status import read_status
from hmil_fast.io.store import open_store

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
SlideFile = Callable[[str], Path]


@pytest.fixture(scope="module")
def slides(slide_file: SlideFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of a real slide under odd lamps, a piece of its glass, and less than a tile of it."""
    folder = tmp_path_factory.mktemp("slides")
    with openslide.OpenSlide(slide_file("cmu1_small_pyramid.tif")) as slide:
        size = slide.level_dimensions[1]
        pixels = np.asarray(slide.read_region((0, 0), 1, size).convert("RGB"))
    row, column = np.unravel_index(
        pixels[50:-50, 50:-50, 1].argmin(), (size[1] - 100, size[0] - 100)
    )
    looks = {
        "dim": pixels * 0.7,
        "pink": pixels * np.array([1.0, 0.75, 0.9]),
        "glass": np.full((600, 600, 3), 243),
        "small": pixels[row : row + 100, column : column + 100],
    }
    for name, look in looks.items():
        tifffile.imwrite(
            folder / f"{name}.tif",
            look.astype(np.uint8),
            tile=(256, 256),
            photometric="rgb",
            compression="deflate",
            resolution=(10_000, 10_000),
            resolutionunit="centimeter",
        )
    return folder


@pytest.mark.slow
def test_said_on_its_line_in_the_summary_in_status_and_in_the_picture(
    slides: Path, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    args = ["extract", slides, "--store", store, "--mpp", 1]
    done = cli(*args)
    assert done.returncode == 0
    what = {
        "dim": "dim or coloured glass: tissue is what is darker than it",
        "pink": "no glass found: everything was taken as tissue",
        "glass": "0 tiles: no tissue found: all glass",
        "small": "0 tiles: the slide is smaller than a tile",
    }
    lines = {line.split(":")[0]: line for line in done.stderr.splitlines()}
    assert main(["status", str(store)]) == 0
    status = capsys.readouterr().out
    for name, text in what.items():
        line = lines[f"! {name}"]
        assert text in line
        assert " Fix: " in line
        for said in (done.stdout, status):
            at = said.index(f"  1 slide: {text}")
            ids, fix = said[at:].splitlines()[:2]
            assert ids.endswith(f": {name}")
            assert fix.startswith("    Fix: ")
        assert read_status(store)["notes"][name][0][0].startswith(text)
        with Image.open(store / "overlays" / f"{name}.jpg") as picture:
            foot = np.asarray(picture)[-20:].astype(int)
        assert ((foot[..., 0] > 150) & (foot[..., 1] < 120)).any()  # words in red
    tiles = {name: open_store(store).record(name).num_tiles for name in what}
    assert tiles["pink"] == 5 * 6  # all places
    assert 0 < tiles["dim"] < 20
    assert tiles["glass"] == tiles["small"] == 0
    # the fix, followed
    assert main(["store", "drop", str(store), "pink"]) == 0
    again = cli(*args, "--glass", "244,182,218")
    assert again.returncode == 0
    assert "✓ pink: " in again.stderr
    assert open_store(store).record("pink").num_tiles == tiles["dim"]


def test_a_colour_that_is_none(slides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("white", "1,2", "300,0,0"):
        with pytest.raises(SystemExit):
            main(["doctor", str(slides), "--glass", text])
        assert "is not R,G,B, such as" in capsys.readouterr().err
