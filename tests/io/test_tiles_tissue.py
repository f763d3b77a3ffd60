"""Tissue detection against a known truth and on awkward real slides."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hmil_fast.io.slide import SlideInfo, open_slide
from hmil_fast.io.tiles.grid import TileSpec, plan_grid
from hmil_fast.io.tiles.tissue import THUMBNAIL_PX, TissueMask, find_tissue, overlay

SlideFile = Callable[[str], Path]


def look(
    path: Path, mpp: float, max_px: int = THUMBNAIL_PX
) -> tuple[np.ndarray, TissueMask, SlideInfo]:
    with open_slide(path, mpp=mpp) as slide:
        thumbnail = slide.thumbnail(max_px)
        scale = mpp * slide.info.level_dimensions[0][0] / thumbnail.shape[1]
        return thumbnail, find_tissue(thumbnail, scale), slide.info


@pytest.mark.parametrize("max_px", [1024, THUMBNAIL_PX])
def test_mosaic_against_its_truth(slide_file: SlideFile, max_px: int) -> None:
    _, tissue, info = look(slide_file("mosaic.tif"), 0.5, max_px)
    wide, high = info.level_dimensions[0]
    truth = np.zeros((high, wide), np.uint8)
    with slide_file("mosaic.csv").open() as file:
        for row in csv.DictReader(file):
            x, y, w, h = (int(row[key]) for key in "xywh")
            truth[y : y + h, x : x + w] = 255
    small = Image.fromarray(truth).resize(tissue.mask.shape[::-1], Image.Resampling.BOX)
    share = np.asarray(small) / 255
    assert tissue.note is None
    assert (share * tissue.mask).sum() / share.sum() >= 0.98
    assert ((1 - share) * tissue.mask).sum() / (1 - share).sum() <= 0.05


def test_mosaic_tiles_hold_the_regions(slide_file: SlideFile) -> None:
    _, tissue, info = look(slide_file("mosaic.tif"), 0.5)
    grid, again = (plan_grid(info, TileSpec(min_tissue=0.25), tissue) for _ in range(2))
    assert np.array_equal(grid.xy, again.xy)
    assert np.array_equal(np.lexsort(grid.xy.T), np.arange(len(grid.xy)))
    kept = np.zeros((20, 25), bool)
    kept[grid.xy[:, 1] // 256, grid.xy[:, 0] // 256] = True
    assert not kept[:, 0].any()
    assert grid.tissue.min() >= 0.25
    assert 350 <= len(grid.xy) <= 420


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("CMU-1-Small-Region.svs", 0.36, 0.44), ("cmu1_jpeg2000.svs", 0.48, 0.56)],
)
def test_share_of_tissue(slide_file: SlideFile, name: str, low: float, high: float) -> None:
    thumbnail, tissue, _ = look(slide_file(name), 0.5)
    assert tissue.note is None
    assert tissue.mask.shape == thumbnail.shape[:2]
    assert low < tissue.mask.mean() < high


def test_stitching_is_not_tissue(slide_file: SlideFile) -> None:
    thumbnail, tissue, _ = look(slide_file("cmu1_jpeg2000.svs"), 0.5)
    white = (thumbnail >= 254).all(axis=2)
    assert white.mean() > 0.05
    assert tissue.mask[white].mean() < 0.02
    # off-white glass inside a scanned field, away from any tissue
    for y, x in [(500, 1150), (1100, 1000), (1200, 900)]:
        assert thumbnail[y, x].min() > 230
        assert not tissue.mask[y - 10 : y + 10, x - 10 : x + 10].any()


def test_dark_background_is_never_tissue(slide_file: SlideFile) -> None:
    thumbnail, tissue, info = look(slide_file("dapi_small.ndpi"), 0.913)
    assert tissue.note is not None
    assert tissue.note.startswith("dark background: ")
    assert 0.1 < tissue.mask.mean() < 0.5
    assert thumbnail[tissue.mask].mean() > 3 * thumbnail[~tissue.mask].mean()
    corner = tissue.mask[-100:, -100:]
    assert not corner.any()
    assert 10 < len(plan_grid(info, TileSpec(64, 1.0), tissue).xy) < 200


def test_all_glass_and_all_black() -> None:
    rng = np.random.default_rng(0)
    glass = rng.integers(238, 246, (200, 300, 3), np.uint8)
    for blank in (glass, np.full_like(glass, 255)):
        tissue = find_tissue(blank, 8.0)
        assert not tissue.mask.any()
        assert tissue.note == "no tissue found: all glass"
    dark = find_tissue(np.zeros_like(glass), 8.0)
    assert not dark.mask.any()
    assert dark.note is not None
    assert dark.note.startswith("dark background")


def test_black_padding_beside_glass_is_not_tissue() -> None:
    thumbnail = np.full((300, 300, 3), 242, np.uint8)
    thumbnail[:, 150:] = 0
    thumbnail[100:200, 40:110] = (200, 120, 170)
    tissue = find_tissue(thumbnail, 8.0)
    assert tissue.mask[100:200, 40:110].all()
    assert not tissue.mask[:, 150:].any()


def test_holes_and_dust_go_by_size() -> None:
    thumbnail = np.full((300, 300, 3), 242, np.uint8)
    thumbnail[50:250, 50:250] = (200, 120, 170)
    thumbnail[80:90, 80:90] = 242  # 100 px × 64 µm² = 6,400 µm²: a gland
    thumbnail[150:200, 150:200] = 242  # 160,000 µm²: outside the tissue
    thumbnail[10:14, 10:14] = 90  # 1,024 µm²: dust
    tissue = find_tissue(thumbnail, 8.0)
    assert tissue.mask[80:90, 80:90].all()
    assert not tissue.mask[155:195, 155:195].any()
    assert not tissue.mask[:30, :30].any()


def test_overlay_draws_outline_and_tiles(slide_file: SlideFile) -> None:
    thumbnail, tissue, info = look(slide_file("CMU-1-Small-Region.svs"), 0.499, 800)
    grid = plan_grid(info, TileSpec(), tissue)
    picture = np.asarray(overlay(thumbnail, tissue, [grid], info))
    assert picture.shape == thumbnail.shape
    scale = 800 / 2967
    x, y = (grid.xy[0] * scale).round().astype(int)
    assert picture[y, x].tolist() == [30, 80, 220]
    assert (picture == (0, 170, 60)).all(axis=2).sum() > 500


def lit(thumbnail: np.ndarray, light: tuple[float, float, float], noise: float = 0) -> np.ndarray:
    """The same slide under another lamp, with a noisy camera."""
    seen = thumbnail * np.array(light)
    seen += np.random.default_rng(0).normal(0, noise, seen.shape)
    return np.clip(seen.round(), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "mosaic.tif"])
@pytest.mark.parametrize(
    ("light", "noise", "says"),
    [
        ((0.9, 0.9, 0.9), 0, None),
        ((0.75, 0.75, 0.75), 0, "dim or coloured glass"),
        ((0.5, 0.5, 0.5), 0, "dim or coloured glass"),
        ((1.0, 0.93, 0.65), 0, "dim or coloured glass"),
        ((0.85, 0.9, 1.0), 0, "dim or coloured glass"),
        ((1.0, 1.0, 1.0), 15, "noisy glass"),
        ((0.75, 0.72, 0.6), 8, "dim or coloured glass: .*; noisy glass"),
    ],
)
def test_other_lamps_show_the_same_tissue(
    slide_file: SlideFile,
    name: str,
    light: tuple[float, float, float],
    noise: float,
    says: str | None,
) -> None:
    thumbnail, usual, _ = look(slide_file(name), 0.5, 700)
    tissue = find_tissue(lit(thumbnail, light, noise), usual.um_per_px)
    both, either = (tissue.mask & usual.mask).sum(), (tissue.mask | usual.mask).sum()
    assert both / either > (0.85 if noise else 0.98)
    if says is None:
        assert tissue.note is None
    else:
        assert tissue.note is not None
        assert re.match(says, tissue.note)
        assert "--glass" in tissue.fix


def test_what_cannot_be_told_is_said(slide_file: SlideFile) -> None:
    thumbnail, usual, _ = look(slide_file("CMU-1-Small-Region.svs"), 0.5, 700)
    pink = lit(thumbnail, (1.0, 0.75, 0.9))
    tissue = find_tissue(pink, usual.um_per_px)
    assert tissue.mask.all()
    assert tissue.note == "no glass found: everything was taken as tissue"
    colour = tuple(np.median(pink[~usual.mask], axis=0).astype(int).tolist())
    stated = find_tissue(pink, usual.um_per_px, colour)
    assert abs(stated.mask.mean() - usual.mask.mean()) < 0.02
    assert (stated.note, stated.fix) == (None, "")
    shaded = thumbnail * np.linspace(1, 0.7, thumbnail.shape[1])[:, None]
    uneven = find_tissue(shaded.astype(np.uint8), usual.um_per_px)
    assert uneven.note == "uneven glass: its darker parts were taken as tissue"
    inside = np.full_like(thumbnail, 90)  # a crop that is tissue throughout
    inside[...] = np.where(usual.mask[..., None], thumbnail, (190, 110, 160))
    everything = find_tissue(inside, usual.um_per_px)
    assert everything.mask.mean() > 0.95
    assert everything.note is not None


def test_unread_grey_is_no_glass(slide_file: SlideFile) -> None:
    thumbnail, usual, _ = look(slide_file("CMU-1-Small-Region.svs"), 0.5, 700)
    unread = np.where(usual.mask[..., None], thumbnail, 128).astype(np.uint8)
    assert find_tissue(unread, usual.um_per_px).mask.mean() > 0.95


def test_black_glass_and_dim_glass_beside_black_padding(slide_file: SlideFile) -> None:
    thumbnail, usual, _ = look(slide_file("CMU-1-Small-Region.svs"), 0.5, 700)
    black = np.where(usual.mask[..., None], thumbnail, 3).astype(np.uint8)
    tissue = find_tissue(black, usual.um_per_px)
    assert tissue.note is not None
    assert tissue.note.startswith("dark background")
    assert "--glass" in tissue.fix
    assert (tissue.mask & usual.mask).sum() / (tissue.mask | usual.mask).sum() > 0.95
    padded = lit(thumbnail, (0.7, 0.7, 0.7))
    padded[:, : padded.shape[1] // 3] = 0
    there = np.s_[:, padded.shape[1] // 3 + 5 :]
    dim = find_tissue(padded, usual.um_per_px).mask
    assert not dim[:, : padded.shape[1] // 3].any()
    assert (dim[there] == usual.mask[there]).mean() > 0.98


def test_a_small_picture_of_glass_is_no_hole_in_tissue() -> None:
    tissue = find_tissue(np.full((13, 13, 3), 244, np.uint8), 4.0)
    assert not tissue.mask.any()
    assert tissue.note == "no tissue found: all glass"


def test_flat_tissue_that_covers_most_is_not_the_glass() -> None:
    thumbnail = np.full((300, 300, 3), 180, np.uint8)
    thumbnail[20:280, 20:280] = (170, 90, 140)
    tissue = find_tissue(thumbnail, 8.0)
    assert tissue.mask[20:280, 20:280].all()
    assert not tissue.mask[:15].any()
    assert tissue.note is not None
    assert tissue.note.startswith("dim or coloured glass")
