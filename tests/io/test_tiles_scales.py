"""Several scales of one slide: which tiles, and which coarse tile each fine one lies in."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmil_fast.errors import UsageError
from hmil_fast.io.slide import SlideInfo, open_slide
from hmil_fast.io.tiles.grid import TileGrid, TileSpec, plan_grid, plan_grids
from hmil_fast.io.tiles.tissue import TissueMask, find_tissue

SlideFile = Callable[[str], Path]
ALL = TissueMask(np.ones((50, 40), np.bool_), 30.0, None)


def made_up(levels: tuple[tuple[int, int], ...], mpp: float) -> SlideInfo:
    tiles = tuple((256, 256) for _ in levels)
    return SlideInfo(Path("x.svs"), "cucim", "aperio", "jpeg", levels, tiles, mpp, "user", None)


def check_parents(fine: TileGrid, coarse: TileGrid) -> None:
    """Each tile's centre lies in its parent, seen in level-0 px; edges are rounded to whole px."""
    assert fine.parent is not None
    assert fine.parent.dtype == np.int32
    assert len(fine.parent) == len(fine.xy)
    assert (fine.parent >= 0).all()
    centre = fine.coords + fine.tile_px_level0 / 2
    corner = coarse.coords[fine.parent]
    assert (corner <= centre + 1).all()
    assert (centre <= corner + coarse.tile_px_level0 + 1).all()


def test_scales_of_a_real_slide_share_their_tissue(slide_file: SlideFile) -> None:
    with open_slide(slide_file("cmu1_small_pyramid.tif")) as slide:
        info, thumbnail = slide.info, slide.thumbnail(2048)
    tissue = find_tissue(thumbnail, info.level_mpp(0) * 2220 / thumbnail.shape[1])
    spec = TileSpec(128, 0.5, min_tissue=0.9, coarser=(1.0, 2.0))
    grids = plan_grids(info, spec, tissue)
    assert [grid.mpp_requested for grid in grids] == [0.5, 1.0, 2.0]
    assert [grid.level for grid in grids] == [0, 1, 2]
    alone = [plan_grid(info, TileSpec(128, mpp, 0.9), tissue) for mpp in spec.scales]
    np.testing.assert_array_equal(grids[0].coords, alone[0].coords)
    for fine, coarse in itertools.pairwise(grids):
        check_parents(fine, coarse)
        assert fine.parent is not None
        assert set(fine.parent) <= set(range(len(coarse.coords)))
        # nested: four children at most, and the parent's row and column are half of theirs
        assert np.bincount(fine.parent).max() <= 4
        np.testing.assert_array_equal(
            fine.xy // fine.read_px // 2, coarse.xy[fine.parent] // coarse.read_px
        )
    assert grids[-1].parent is None
    for grid, single, finer in zip(grids[1:], alone[1:], grids, strict=False):
        here, there = ({tuple(corner) for corner in g.coords.tolist()} for g in (grid, single))
        added = here - there
        assert there <= here
        assert added
        rows = [i for i, corner in enumerate(grid.coords.tolist()) if tuple(corner) in added]
        assert set(rows) <= set(np.asarray(finer.parent))
        assert (grid.tissue[rows] < 0.9).all()


def test_a_coarse_scale_read_from_the_fine_level_is_made_of_whole_tiles() -> None:
    info = made_up(((20_001, 9_999),), 0.2465)
    fine, coarse = plan_grids(info, TileSpec(mpp=0.5, coarser=(2.0,)), ALL)
    assert (fine.read_px, coarse.read_px) == (519, 4 * 519)  # alone 2077
    assert coarse.mpp_effective == pytest.approx(2.0, rel=0.01)
    check_parents(fine, coarse)
    np.testing.assert_array_equal(fine.xy // coarse.read_px, coarse.xy[fine.parent] // (4 * 519))


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(700, 9000), st.integers(700, 9000)),
    mpp=st.floats(0.1, 0.5),
    times=st.lists(st.floats(1.1, 5.0), min_size=1, max_size=2),
    levels=st.integers(1, 3),
)
def test_every_tile_lies_in_its_one_parent(
    size: tuple[int, int], mpp: float, times: list[float], levels: int
) -> None:
    pyramid = tuple((size[0] // 4**k, size[1] // 4**k) for k in range(levels))
    coarser = tuple(0.5 * np.cumprod(times))
    grids = plan_grids(made_up(pyramid, mpp), TileSpec(64, 0.5, coarser=coarser), ALL)
    for fine, coarse in itertools.pairwise(grids):
        assert fine.parent is not None
        centre = np.minimum(fine.coords + fine.tile_px_level0 / 2, np.array(size) - 1)
        corner, side = coarse.coords[fine.parent], coarse.tile_px_level0
        # a pyramid's level may be a px short in one axis: its scale then differs by that
        slack = 1 + 4 ** (levels - 1) + centre * 4**levels / min(size)
        assert (corner <= centre + slack).all()
        assert (centre <= corner + side + slack).all()


def test_the_scales_are_part_of_the_spec_only_where_there_are_several() -> None:
    assert TileSpec().to_dict() == {
        "tile_px": 256,
        "mpp": 0.5,
        "min_tissue": 0.25,
        "allow_upsample": False,
    }
    assert TileSpec(coarser=(2.0,)).to_dict()["coarser"] == [2.0]
    with pytest.raises(UsageError, match=r"0\.5 and 0\.505"):
        TileSpec(coarser=(0.505,))
