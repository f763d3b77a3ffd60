"""The grid: which level, which tiles, exact coordinates, on real pyramids."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmil_fast.errors import SlideError, UsageError
from hmil_fast.io.slide import SlideInfo, open_slide
from hmil_fast.io.tiles.grid import TileSpec, plan_grid
from hmil_fast.io.tiles.tissue import TissueMask

SlideFile = Callable[[str], Path]
ALL = TissueMask(np.ones((50, 40), np.bool_), 30.0, None)


def slide_info(slide_file: SlideFile, name: str, mpp: float | None = None) -> SlideInfo:
    with open_slide(slide_file(name), mpp=mpp) as slide:
        return slide.info


def made_up(levels: tuple[tuple[int, int], ...], mpp: float) -> SlideInfo:
    tiles = tuple((256, 256) for _ in levels)
    return SlideInfo(Path("x.svs"), "cucim", "aperio", "jpeg", levels, tiles, mpp, "user", None)


@pytest.mark.parametrize(
    ("mpp", "level", "read_px"),
    [(0.5, 0, 256), (1.0, 1, 256), (2.0, 2, 256), (0.75, 0, 385), (1.5, 1, 385), (4.0, 2, 513)],
)
def test_level_is_chosen_by_mpp(
    slide_file: SlideFile, mpp: float, level: int, read_px: int
) -> None:
    info = slide_info(slide_file, "cmu1_small_pyramid.tif")
    grid = plan_grid(info, TileSpec(mpp=mpp), ALL)
    assert (grid.level, grid.read_px, grid.tile_px) == (level, read_px, 256)
    assert grid.mpp_requested == mpp
    assert grid.mpp_read == info.level_mpp(level)
    assert grid.mpp_effective == pytest.approx(mpp, rel=0.01)
    assert grid.tile_px_level0 == read_px * 2220 / info.level_dimensions[level][0]


def test_coarser_slide_is_refused_unless_upsampling_is_allowed(slide_file: SlideFile) -> None:
    info = slide_info(slide_file, "cmu1_small_pyramid.tif")
    with pytest.raises(SlideError, match=r"0\.499 .*0\.25") as error:
        plan_grid(info, TileSpec(mpp=0.25), ALL)
    assert "--mpp 0.499" in error.value.fix
    grid = plan_grid(info, TileSpec(mpp=0.25, allow_upsample=True), ALL)
    assert (grid.level, grid.read_px) == (0, 128)
    assert grid.mpp_effective == pytest.approx(0.2495)


def test_missing_mpp_is_refused(slide_file: SlideFile) -> None:
    with pytest.raises(SlideError, match="states no usable mpp"):
        plan_grid(slide_info(slide_file, "cmu1_jpeg2000.svs"), TileSpec(), ALL)


def test_edge_tiles_are_kept_and_rows_come_in_order() -> None:
    grid = plan_grid(made_up(((1000, 600),), 0.5), TileSpec(min_tissue=0), ALL)
    assert grid.xy.tolist() == [[x, y] for y in (0, 256, 512) for x in (0, 256, 512, 768)]
    assert grid.xy.dtype == grid.coords.dtype == np.int64
    assert np.array_equal(grid.xy, grid.coords)
    inside = 88 / 256
    assert grid.tissue[[0, 8]] == pytest.approx([1, inside])
    assert grid.tissue[11] == pytest.approx(inside * 232 / 256)
    fewer = plan_grid(made_up(((1000, 600),), 0.5), TileSpec(min_tissue=0.35), ALL)
    assert np.array_equal(fewer.xy, grid.xy[:8])


@given(
    st.integers(1000, 200_000), st.integers(1000, 200_000), st.integers(2, 40), st.integers(64, 512)
)
def test_coords_are_the_exact_ratio_rounded_half_up(w: int, h: int, down: int, tile: int) -> None:
    info = made_up(((w, h), (w // down, h // down)), 0.25)
    spec = TileSpec(tile, info.level_mpp(1), min_tissue=0)
    grid = plan_grid(info, spec, ALL)
    assert grid.level == 1
    for (x, y), (x0, y0) in zip(grid.xy[-40:].tolist(), grid.coords[-40:].tolist(), strict=True):
        assert x0 == (2 * x * w + w // down) // (2 * (w // down))
        assert y0 == (2 * y * h + h // down) // (2 * (h // down))


@given(st.integers(0, 2**32 - 1), st.integers(20, 90))
def test_tissue_share_is_exact_area(seed: int, tile: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((30, 23)) < 0.4
    info = made_up(((23 * 10, 30 * 10),), 0.5)
    grid = plan_grid(info, TileSpec(tile, min_tissue=0), TissueMask(mask, 5.0, None))
    big = np.pad(mask.repeat(10, 0).repeat(10, 1), ((0, tile), (0, tile)))
    for (x, y), share in zip(grid.xy.tolist(), grid.tissue.tolist(), strict=True):
        assert share == pytest.approx(big[y : y + tile, x : x + tile].mean(), abs=1e-6)


def test_limits() -> None:
    huge = made_up(((600_000, 600_000),), 0.5)
    with pytest.raises(SlideError, match=r"5,494,336 tiles"):
        plan_grid(huge, TileSpec(), ALL)
    with pytest.raises(SlideError, match=r"10,240 px"):
        plan_grid(huge, TileSpec(mpp=20.0), ALL)
    for bad in ({"tile_px": 0}, {"mpp": 0.0}, {"mpp": float("nan")}, {"min_tissue": 1.5}):
        with pytest.raises(UsageError):
            TileSpec(**bad)


def test_spec_is_plain_values() -> None:
    assert TileSpec().to_dict() == {
        "tile_px": 256, "mpp": 0.5, "min_tissue": 0.25, "allow_upsample": False,
    }  # fmt: skip
    assert replace(TileSpec(), mpp=1.0) != TileSpec()
