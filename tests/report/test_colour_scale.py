"""From attention to colour: what a place among the colours stands for."""

import numpy as np
import pytest

from hmil_fast.report.colour_scale import (
    LIMIT,
    colour_places,
    concentration,
    key_ticks,
    tile_values,
)


def test_ranks_share_ties_and_pass_over_nan() -> None:
    got = tile_values([3.0, np.nan, 1e-9, 3.0, 1e6], "rank")
    np.testing.assert_allclose(got, [0.5, np.nan, 0, 0.5, 1])
    np.testing.assert_allclose(tile_values([2.0, 2.0, 2.0], "rank"), 0.5)
    np.testing.assert_allclose(tile_values([7.0], "rank"), 0.5)
    assert tile_values([], "rank").shape == (0,)
    assert np.isnan(tile_values([np.nan, np.inf], "rank")).all()


def test_shares_are_times_the_even_share_of_the_tiles_that_are_known() -> None:
    got = tile_values([0.5, np.nan, 0.25, 0.25, 0.0], "share")
    np.testing.assert_allclose(got, [2, np.nan, 1, 1, 0])
    np.testing.assert_allclose(tile_values([0.0, 0.0], "share"), 1)
    assert np.isnan(tile_values([np.nan], "share")).all()
    places = colour_places([0, 1 / LIMIT, 0.5, 1, 2, LIMIT, 1e9], "share")
    np.testing.assert_allclose(places[[0, 1, 3, 5, 6]], [0, 0, 0.5, 1, 1])
    assert places[4] - 0.5 == pytest.approx(0.5 - places[2])


@pytest.mark.parametrize("scale", ["share", "rank"])
def test_the_key_says_what_the_colours_mean(scale: str) -> None:
    ticks = key_ticks(scale)
    assert (min(ticks), max(ticks)) == (0, 1)
    assert ticks[0.5] == {"share": "1", "rank": "0.5"}[scale]


def test_concentration_is_the_share_of_the_highest_tenth() -> None:
    for n in (1, 3, 10, 37):
        assert concentration(np.full(n, 1 / n)) == pytest.approx(0.1)
    assert concentration([np.nan, *np.full(9, 0.05), 0.55]) == pytest.approx(0.55)
    # half a tile of five
    assert concentration([0.6, 0.1, 0.1, 0.1, 0.1]) == pytest.approx(0.3)
    assert concentration([]) == concentration([np.nan]) == 0.1
