"""What a person sees of a slide: the tiles on its overlay and some of them on a sheet."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hmil_fast.extraction.encoders import Encoder
from hmil_fast.extraction.pictures import SHEET_TILES, ContactSheet, save_overlay
from hmil_fast.extraction.pipeline.extractor import Extractor, store_spec
from hmil_fast.extraction.prepare import prepare_slide
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.slide import TileStatus
from hmil_fast.io.store import create_store
from hmil_fast.io.tiles.augment import PixelParams
from hmil_fast.io.tiles.grid import TileSpec
from hmil_fast.io.tiles.pixels import change
from hmil_fast.io.tiles.stain import mapped
from hmil_fast.io.tiles.tissue import TILE_COLOUR, overlay, tile_colour

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
            sheet = ContactSheet(store, ready)
            for first in range(0, count, step):
                xy = ready.grid.xy[first : first + step]
                pixels = np.empty((len(xy), size, size, 3), np.uint8)
                status = ready.reader.read(ready.grid.level, xy, size, pixels)
                status[(np.arange(first, first + len(xy)) % 4) == 0] = TileStatus.CORRUPT
                sheet.look(0, first, pixels, status)
            sheets.append(np.asarray(sheet.draw()))
        assert np.array_equal(*sheets), "batches decide what is shown"
        picks = sheet._strips[0].picks
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
            overlay(ready.picture, ready.tissue, ready.grids, ready.reader.info), np.int16
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


def test_each_scale_is_drawn_and_normalised_tiles_are_shown(
    slide_file: SlideFile, tmp_path: Path, encoder: Encoder
) -> None:
    spec = TileSpec(96, 0.5, coarser=(2.0,), stain_norm="macenko")
    store = create_store(tmp_path / "store", store_spec(encoder, spec, "float16"))
    ready = prepare_slide(SlideTask("s", slide_file("CMU-1-Small-Region.svs")), spec)
    sheet = ContactSheet(store, ready)
    read: dict[tuple[int, int], np.ndarray] = {}
    with ready.reader:
        save_overlay(store, ready)
        for scale, grid in enumerate(ready.grids):
            size = grid.read_px
            for row, xy in enumerate(grid.xy):
                tile = np.empty((1, size, size, 3), np.uint8)
                sheet.look(scale, row, tile, ready.reader.read(grid.level, xy[None], size, tile))
                read[scale, row] = tile[0]
    drawn = np.asarray(sheet.draw())
    fine, coarse = (strip.picks for strip in sheet._strips)
    assert (len(fine), len(coarse)) == (SHEET_TILES, 8)
    assert ready.stain is not None
    density = ready.stain.matrix[None].astype(np.float32)
    tile = torch.from_numpy(read[0, int(fine[0])]).permute(2, 0, 1)[None]
    seen = change(tile, PixelParams(density=density))[0].permute(1, 2, 0).numpy()
    shown = drawn[4:100, 4:100].astype(int)
    assert np.abs(shown - seen).max() < 0.6
    assert np.abs(shown - read[0, int(fine[0])]).mean() > 3
    size = ready.grids[1].read_px
    small = Image.fromarray(read[1, int(coarse[0])]).reduce(round(size / 96))
    other = mapped(np.asarray(small), ready.stain.matrix)
    places = [
        y
        for y in range(500, len(drawn) - len(other))
        if np.array_equal(drawn[y : y + len(other), 4 : 4 + len(other)], other)
    ]
    assert len(places) == 1
    with Image.open(store.path / "overlays" / "s.jpg") as picture:
        assert picture.height > ready.picture.shape[0] + 20
        foot = np.asarray(picture)[ready.picture.shape[0] :].astype(int)
        above = np.asarray(picture)[: ready.picture.shape[0]].astype(int)
    assert (foot.max(axis=2) < 80).any()  # the scale bar
    for n in range(2):
        for part in (foot, above):
            assert (np.abs(part - tile_colour(n)).max(axis=2) < 40).any()
