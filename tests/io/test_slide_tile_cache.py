"""Each of a slide's own tiles is decoded once, and only those that are asked for."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hmil_fast.io.slide import SlideReader, open_slide, source_tile_cache
from hmil_fast.io.slide.tiled_reader import TiledReader
from hmil_fast.io.tiles.decode import decode_tiles
from hmil_fast.io.tiles.grid import TileGrid, TileSpec, plan_grid
from hmil_fast.io.tiles.tissue import TissueMask

SlideFile = Callable[[str], Path]
EVERYWHERE = TissueMask(np.ones((8, 10), np.bool_), 300.0, None)


class Counting:
    """Counts what a reader's source decodes."""

    def __init__(self, slide: SlideReader) -> None:
        assert isinstance(slide, TiledReader)
        self.decoded: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._source, slide._source = slide._source, self

    def decode(
        self, level: int, tiles: Sequence[int], data: Sequence[bytes], spare: list[Any]
    ) -> list[Any]:
        with self._lock:
            self.decoded += [(level, tile) for tile in tiles]
        return self._source.decode(level, tiles, data, spare)

    def close(self) -> None:
        self._source.close()


@pytest.fixture(params=["nvimagecodec", "cucim"])
def counted(
    slide_file: SlideFile, request: pytest.FixtureRequest
) -> Iterator[tuple[SlideReader, Counting]]:
    with open_slide(slide_file("mosaic.tif"), reader=request.param) as slide:
        yield slide, Counting(slide)


def run(slide: SlideReader, grids: TileGrid | list[TileGrid], threads: int = 3) -> None:
    for tiles in decode_tiles(slide, grids, batch=50, threads=threads):
        assert not tiles.status.any()
        tiles.release()


def shifted(grid: TileGrid, by: int) -> TileGrid:
    object.__setattr__(grid, "xy", grid.xy + by)
    return grid


@pytest.mark.parametrize(("size", "shift"), [(256, 0), (256, 100), (224, 0), (512, 30), (900, 5)])
def test_each_source_tile_is_decoded_once(
    counted: tuple[SlideReader, Counting], size: int, shift: int
) -> None:
    slide, count = counted
    spec = TileSpec(size, 0.5, min_tissue=0)
    run(slide, shifted(plan_grid(slide.info, spec, EVERYWHERE), shift))
    assert len(count.decoded) == len(set(count.decoded)) == 25 * 20


def test_two_scales_of_one_level_share_what_is_decoded(
    counted: tuple[SlideReader, Counting],
) -> None:
    slide, count = counted
    grids = [
        shifted(plan_grid(slide.info, TileSpec(size, 0.5, min_tissue=0), EVERYWHERE), 9)
        for size in (256, 900)
    ]
    run(slide, grids)
    assert len(count.decoded) == len(set(count.decoded)) == 25 * 20


def test_only_touched_source_tiles_are_decoded(counted: tuple[SlideReader, Counting]) -> None:
    slide, count = counted
    mask = np.zeros((8, 10), np.bool_)
    mask[2, 3] = True
    grid = plan_grid(slide.info, TileSpec(224, 0.5, min_tissue=0.9), TissueMask(mask, 300.0, None))
    assert len(grid.xy) == 4
    run(slide, grid)
    touched = {
        y // 256 * 25 + x // 256
        for left, top in grid.xy.tolist()
        for y in range(top, top + 224)
        for x in range(left, left + 224)
    }
    assert sorted(count.decoded) == sorted((0, tile) for tile in touched)


@pytest.mark.parametrize(("size", "shift", "most"), [(256, 0, 0), (256, 100, 26), (224, 0, 26)])
def test_about_a_row_is_held(
    counted: tuple[SlideReader, Counting], size: int, shift: int, most: int
) -> None:
    slide, _ = counted
    grid = plan_grid(slide.info, TileSpec(size, 0.5, min_tissue=0), EVERYWHERE)
    xy = grid.xy + shift
    tiles = slide.band(0, [(xy, size)])
    assert isinstance(tiles, source_tile_cache.Band)
    out, held = np.empty((1, size, size, 3), np.uint8), []
    for corner in xy:
        tiles.read(corner[None], size, out)
        held.append(len(tiles._held))
    assert max(held) <= most
    assert held[-1] == 0


def test_little_memory_costs_time_and_nothing_else(
    counted: tuple[SlideReader, Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, count = counted
    grid = shifted(plan_grid(slide.info, TileSpec(256, 0.5, min_tissue=0), EVERYWHERE), 100)
    expected = np.empty((len(grid.xy), 256, 256, 3), np.uint8)
    slide.read(0, grid.xy, 256, expected)
    once = len(count.decoded)
    monkeypatch.setattr(source_tile_cache, "MAX_BAND_BYTES", 5 * 256 * 256 * 3)
    for tiles in decode_tiles(slide, grid, batch=50, threads=2):
        pixels = expected[tiles.rows : tiles.rows + len(tiles.pixels)]
        assert np.array_equal(tiles.pixels, pixels)
        tiles.release()
    assert once < len(count.decoded) - once
