"""Letters of any script that slides and classes are named in are drawn, not boxes for them."""

import logging
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hmil_fast.extraction.pictures import save_overlay
from hmil_fast.extraction.prepare import prepare_slide
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.fonts import drawn, picture_font
from hmil_fast.io.store import StoreSpec, create_store
from hmil_fast.io.tiles.grid import TileSpec
from hmil_fast.report.drawing import Node, heatmap_sheet
from hmil_fast.report.tile_sheet import TileRow, tile_sheet

# pairs of letters of one width: drawn as boxes, they look the same
PAIRS = [("ä", "ö"), ("µ", "ß"), ("Ж", "Ш"), ("患", "者"), ("か", "カ"), ("한", "글")]


def mask(text: str, *, bold: bool = False) -> bytes:
    page = Image.new("L", (200, 40))
    font = picture_font(text, 20, bold=bold)
    ImageDraw.Draw(page).text((5, 5), drawn(text), 255, font)
    return page.tobytes()


@pytest.mark.parametrize("bold", [False, True])
@pytest.mark.parametrize("letter", [letter for pair in PAIRS for letter in pair])
def test_every_letter_is_in_a_font(letter: str, bold: bool) -> None:
    box = mask(letter + "\uffff", bold=bold), mask(letter * 2, bold=bold)
    assert box[0] != box[1]
    apart = unicodedata.normalize("NFD", letter)
    assert mask(apart, bold=bold) == mask(letter, bold=bold)


def sheet(text: str) -> Image.Image:
    weights, corners = np.array([0.5]), np.zeros((1, 2), np.int64)
    row = TileRow(text, np.zeros((1, 64, 64, 3), np.uint8), weights, corners)
    return tile_sheet([row], 300)


def maps(text: str) -> Image.Image:
    thumbnail = np.full((100, 200, 3), 255, np.uint8)
    nodes = [Node(text, np.ones(1), True), Node(f"not {text}", np.ones(1))]
    return heatmap_sheet(
        thumbnail, np.zeros((1, 2)), 64.0, nodes, downsample=1.0, mpp=1.0, title=text
    )


@pytest.mark.slow
@pytest.mark.parametrize("draw", [sheet, maps])
def test_pictures_of_a_run(
    draw: Callable[[str], Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # of libraries among each other
        for first, second in PAIRS:
            assert draw(first).tobytes() != draw(second).tobytes()
    assert caplog.records == []


def test_pictures_of_a_job(slide_file: Callable[[str], Path], tmp_path: Path) -> None:
    store = create_store(tmp_path / "store", StoreSpec(4, "float32", {"name": "e"}, {}))
    path, spec = slide_file("cmu1_small_pyramid.tif"), TileSpec(mpp=2)
    seen = []
    for letter in ("患", "者"):
        ready = prepare_slide(SlideTask(letter * 3, path), spec)
        with ready.reader:
            save_overlay(store, ready)
    for file in sorted((store.path / "overlays").iterdir()):
        with Image.open(file) as picture:
            seen.append(np.asarray(picture).astype(int))
    assert np.abs(seen[0] - seen[1]).max() > 100
