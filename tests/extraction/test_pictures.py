"""What a person sees of a slide: the tiles on its overlay and some of them on a sheet."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from hmil_fast.extraction.encoders import Encoder
from hmil_fast.extraction.pictures import SHEET_TILES, ContactSheet
from hmil_fast.extraction.plan import SlideTask
from hmil_fast.extraction.prepare import prepare_slide
from hmil_fast.extraction.run import Extractor, store_spec
from hmil_fast.io.slide import TileStatus
from hmil_fast.io.store import create_store
from hmil_fast.io.tiles.grid import TileSpec
from hmil_fast.io.tiles.tissue import TILE_COLOUR, overlay

SlideFile = Callable[[str], Path]


def is_red(pixels: np.ndarray) -> np.ndarray:
    red, green, blue = (pixels[..., channel].astype(int) for channel in range(3))
    return (red > 180) & (green < 90) & (blue < 90)


def test_a_sheet_shows_the_tiles_themselves_and_the_bad_ones_framed(
    slide_file: SlideFile, tmp_path: Path, encoder: Encoder
) -> None:
    spec = TileSpec(tile_px=96, mpp=0.5)
    store = create_store(tmp_path / "store", store_spec(encoder, spec, "float16"))
    ready = prepare_slide(SlideTask("s", slide_file("CMU-1-Small-Region.svs")), spec)
    count, size = len(ready.grid.coords), ready.grid.read_px
    sheets = []
    with ready.reader:
        for step in (7, count):
            sheet = ContactSheet(store, "s", ready.grid)
            for first in range(0, count, step):
                xy = ready.grid.xy[first : first + step]
                pixels = np.empty((len(xy), size, size, 3), np.uint8)
                status = ready.reader.read(ready.grid.level, xy, size, pixels)
                status[(np.arange(first, first + len(xy)) % 4) == 0] = TileStatus.CORRUPT
                sheet.look(first, pixels, status)
            sheets.append(np.asarray(sheet.draw()))
        assert np.array_equal(*sheets), "batches decide what is shown"
        picks = sheet._picks
        assert len(np.unique(picks)) == SHEET_TILES
        tile = np.empty((1, size, size, 3), np.uint8)
        for place in (0, 9, 39):
            ready.reader.read(ready.grid.level, ready.grid.xy[picks[place]][None], size, tile)
            y, x = (4 + 100 * index for index in divmod(place, 8))
            assert np.array_equal(sheets[0][y : y + 96, x : x + 96], tile[0])
            assert is_red(sheets[0][y - 2, x : x + 96]).all() == (picks[place] % 4 == 0)


def test_every_slide_of_a_job_has_its_pictures(
    slide_file: SlideFile, tmp_path: Path, encoder: Encoder
) -> None:
    spec = TileSpec(mpp=2.0)
    store = create_store(tmp_path / "store", store_spec(encoder, spec, "float16"))
    extractor = Extractor(store, encoder, spec, batch=4)
    path = slide_file("cmu1_small_pyramid.tif")
    tasks = [SlideTask("a/1", path), SlideTask("b", path)]
    results = list(extractor.run(tasks, lambda task, done, total: None))
    assert not any(result.error for result in results)
    for kind in ("overlays", "contact-sheets"):
        names = sorted(file.name for file in (store.path / kind).iterdir())
        assert names == ["a%2F1.jpg", "b.jpg"]
        for file in (store.path / kind).iterdir():
            with Image.open(file) as picture:
                assert picture.format == "JPEG"
                assert max(picture.size) > 500


def test_small_tiles_tint_their_area_and_leave_the_rest(slide_file: SlideFile) -> None:
    ready = prepare_slide(SlideTask("s", slide_file("CMU-1-Small-Region.svs")), TileSpec(32))
    with ready.reader:
        wide, high = ready.reader.info.level_dimensions[0]
        drawn = np.asarray(
            overlay(ready.picture, ready.tissue, ready.grid, ready.reader.info), np.int16
        )
    covered = np.zeros((high, wide), bool)
    for x, y in ready.grid.xy:
        covered[y : y + 32, x : x + 32] = True
    size = ready.picture.shape[1::-1]
    small = np.asarray(Image.fromarray(covered).resize(size, Image.Resampling.NEAREST))
    changed = (drawn != ready.picture).any(axis=2)
    green = (drawn == (0, 170, 60)).all(axis=2)
    assert (changed == small)[~green].mean() > 0.99
    tinted = (2 * ready.picture.astype(int) + TILE_COLOUR) // 3
    assert (drawn == tinted).all(axis=2)[small].mean() > 0.7
