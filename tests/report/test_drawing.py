"""Heatmaps: what is painted where, on a real slide."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hmil_fast.report.drawing import (
    Node,
    heatmap_sheet,
    paint,
    round_length,
)
from hmil_fast.report.tile_sheet import TileRow, stacked, tile_sheet

WHITE = np.full((100, 80, 3), 255, np.uint8)


def changed(thumbnail: NDArray, picture: NDArray) -> NDArray:
    return (thumbnail != picture).any(axis=2)


@pytest.mark.parametrize(
    ("um", "want"), [(999, 500), (1000, 1000), (5.1, 5), (4.9, 2), (0.3, 0.2), (19, 10)]
)
def test_scale_bar_is_round(um: float, want: float) -> None:
    assert round_length(um) == pytest.approx(want)


def test_tiles_lie_where_their_coordinates_say() -> None:
    # level-0 px 160, 320 with side 80 at a downsample of 8: thumbnail x 20..30, y 40..50
    picture = paint(WHITE, [[160, 320]], 80, [1.0], 8)
    rows, columns = np.nonzero(changed(WHITE, picture))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (40, 49, 20, 29)
    assert changed(WHITE, picture).sum() == 100


def test_neighbours_touch_without_overlap_at_odd_scales() -> None:
    corners = [[x, y] for y in range(0, 700, 100) for x in range(0, 500, 100)]
    picture = paint(WHITE, corners, 100, np.ones(len(corners)), 7.3)
    assert changed(WHITE, picture)[: round(700 / 7.3), : round(500 / 7.3)].all()


def test_tiles_without_a_value_and_outside_are_not_painted() -> None:
    corners = [[0, 0], [200, 0], [-50, 700], [5000, 5000]]
    picture = paint(WHITE, corners, 100, [1.0, np.nan, 2.0, 3.0], 10)
    painted = changed(WHITE, picture)
    assert painted[0:10, 0:10].all()
    assert not painted[0:10, 20:30].any()
    assert painted[70:80, 0:5].all()
    assert painted.sum() == 100 + 50


def test_higher_weights_are_lighter_and_overlaps_take_the_mean() -> None:
    corners = [[0, 0], [200, 0], [400, 0], [200, 400], [200, 400]]
    grey = np.full_like(WHITE, 128)
    picture = paint(grey, corners, 100, [1.0, 50.0, 9000.0, 1.0, 9000.0], 10, "rank").astype(int)
    low, middle, high, mean = (
        picture[y + 5, x + 5].sum() for x, y in ((0, 0), (20, 0), (40, 0), (20, 40))
    )
    assert low < middle < high
    assert low < mean < high
    # both tied pairs average to the middle rank, that of the 50
    assert mean == middle


def test_even_attention_looks_even_and_a_colour_means_the_same_on_every_slide() -> None:
    grey = np.full_like(WHITE, 128)
    corners = [[100 * i, 0] for i in range(8)]

    def colours(weights: list[float], scale: str = "share") -> NDArray:
        return paint(grey, corners, 100, weights, 10, scale)[5, 5::10][:8].astype(int)

    even = colours([1.0] * 8)
    nearly = colours([1.1] + [1.0] * 7)
    assert np.abs(nearly - even).max() < 15
    assert np.abs(colours([1.1] + [1.0] * 7, "rank") - even).max() > 60
    # twice the even share, among other tiles and with other sums
    twice = colours([2.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])[0]
    assert (twice == colours([20.0, 20.0, 0.0, 0.0, 10.0, 10.0, 10.0, 10.0])[0]).all()


def test_a_tile_smaller_than_a_pixel_is_still_seen() -> None:
    assert changed(WHITE, paint(WHITE, [[333, 333]], 4, [1.0], 64)).sum() == 1


def test_coords_and_weights_must_match() -> None:
    with pytest.raises(ValueError, match="2 tiles"):
        paint(WHITE, [[0, 0], [1, 1]], 100, [1.0], 10)


def test_heatmap_of_a_real_slide(slide_file: Callable[[str], Path]) -> None:
    import openslide

    slide = openslide.OpenSlide(slide_file("CMU-1-Small-Region.svs"))
    thumbnail = np.asarray(slide.get_thumbnail((300, 300)).convert("RGB"))
    downsample = slide.dimensions[0] / thumbnail.shape[1]
    corners = np.array([(x, y) for y in range(0, 2800, 240) for x in range(0, 2000, 240)])
    weights = np.exp(np.arange(len(corners)) / 5)
    options = {"downsample": downsample, "mpp": 0.499}
    nodes = [Node("a $node_{1}$ _name · 0.91", weights, predicted=True)]

    def sheet(**change: Any) -> NDArray:
        return np.asarray(heatmap_sheet(thumbnail, corners, 240, **{**options, **change}))

    one = sheet(nodes=nodes, title="slide")
    assert one.dtype == np.uint8
    # a key in viridis' yellow at the foot
    foot = one[-70:].reshape(-1, 3).astype(int)
    assert (np.abs(foot - (253, 231, 36)).sum(axis=1) < 12).any()
    assert np.array_equal(one, sheet(nodes=nodes, title="slide"))
    assert not np.array_equal(one, sheet(nodes=nodes, title="slide", mpp=None))
    plain = [node._replace(predicted=False) for node in nodes]
    assert not np.array_equal(one, sheet(nodes=plain, title="slide"))


def test_the_sheet_shows_what_the_tiles_cover() -> None:
    thumbnail = np.full((100, 400, 3), 255, np.uint8)
    thumbnail[40:60, 40:60] = 90
    thumbnail[:, 300:] = (255, 0, 0)
    sheet = heatmap_sheet(
        thumbnail, [[40, 40]], 20, [Node("n", [1.0])], downsample=1, mpp=None, title="t"
    )
    pixels = np.asarray(sheet).reshape(-1, 3).astype(int)
    assert not (np.abs(pixels - (255, 0, 0)).sum(axis=1) < 30).any()
    assert (np.abs(pixels - 90).sum(axis=1) < 30).any()


@pytest.mark.parametrize("shape", [(20, 1000, 3), (1000, 20, 3), (1, 1, 3)])
def test_odd_shapes_are_drawn(shape: tuple[int, int, int]) -> None:
    thumbnail = np.full(shape, 200, np.uint8)
    nodes = [Node("a" * 300 + "\n", [1.0])] * 7
    sheet = heatmap_sheet(thumbnail, [[0, 0]], 50, nodes, downsample=10, mpp=0.25, title="<b>" * 80)
    assert max(sheet.size) < 6000


def test_a_slide_without_tiles_is_drawn_plain() -> None:
    none = np.zeros((0, 2))
    heatmap_sheet(WHITE, none, 256, [Node("n", [])], downsample=4, mpp=0.5, title="nothing")


@pytest.mark.parametrize("most", [0, 1, 8])
def test_tiles_are_drawn_in_rows_as_they_are(most: int) -> None:
    pixels = np.stack([np.full((40, 40, 3), 25 * i, np.uint8) for i in range(most)] or [WHITE])[
        :most
    ]
    weights, corners = np.linspace(0.9, 1e-9, most), np.zeros((most, 2), np.int64)
    rows = [TileRow("a node\n", pixels, weights, corners), TileRow("b", pixels[:0], [], [])]
    sheet = tile_sheet(rows, 300)
    assert sheet.width >= 300
    seen = {tuple(c) for c in np.asarray(sheet).reshape(-1, 3)[::7].tolist()}
    assert {(25 * i,) * 3 for i in range(most)} <= seen
    both = stacked(Image.new("RGB", (500, 10), "red"), sheet)
    assert both.size == (max(500, sheet.width), 10 + sheet.height)
