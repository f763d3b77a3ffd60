"""Decoding ahead: order, bounded memory, clean ends."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hmil_fast.io.slide import SlideReader, open_slide
from hmil_fast.io.tiles.batch import DecodeStats
from hmil_fast.io.tiles.decode import decode_tiles
from hmil_fast.io.tiles.grid import TileGrid, TileSpec, plan_grid
from hmil_fast.io.tiles.tissue import TissueMask

SlideFile = Callable[[str], Path]


@pytest.fixture
def mosaic(slide_file: SlideFile) -> Iterator[tuple[SlideReader, TileGrid]]:
    with open_slide(slide_file("mosaic.tif")) as slide:
        everywhere = TissueMask(np.ones((8, 10), np.bool_), 300.0, None)
        yield slide, plan_grid(slide.info, TileSpec(mpp=1.0, min_tissue=0), everywhere)


def decoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.parametrize(
    ("batch", "threads", "slabs"), [(1, 1, 1), (33, 2, 4), (64, 3, 2), (999, 2, 4)]
)
def test_every_tile_once_in_order(
    mosaic: tuple[SlideReader, TileGrid], batch: int, threads: int, slabs: int
) -> None:
    slide, grid = mosaic
    expected = np.empty((len(grid.xy), 256, 256, 3), np.uint8)
    slide.read(grid.level, grid.xy, 256, expected)
    stats, at = DecodeStats(), 0
    for tiles in decode_tiles(slide, grid, batch=batch, threads=threads, slabs=slabs, stats=stats):
        assert tiles.rows == at
        assert tiles.pixels.flags.c_contiguous
        assert tiles.status.tolist() == [0] * len(tiles.pixels)
        assert np.array_equal(tiles.pixels, expected[at : at + len(tiles.pixels)])
        at += len(tiles.pixels)
        tiles.release()
    assert at == len(grid.xy) == stats.tiles == 130
    assert stats.bad == 0
    assert stats.cpu_s > 0
    assert stats.busy_s > 0
    assert not decoders()


def test_part_of_the_grid(mosaic: tuple[SlideReader, TileGrid]) -> None:
    slide, grid = mosaic
    seen = []
    for tiles in decode_tiles(slide, grid, batch=16, threads=2, rows=slice(50, 75)):
        seen += range(tiles.rows, tiles.rows + len(tiles.pixels))
        tiles.release()
    assert seen == list(range(50, 75))
    assert list(decode_tiles(slide, grid, batch=16, threads=2, rows=slice(7, 7))) == []


@pytest.mark.slow
def test_several_scales_come_together_from_the_top_down(
    mosaic: tuple[SlideReader, TileGrid],
) -> None:
    slide, coarse = mosaic
    everywhere = TissueMask(np.ones((8, 10), np.bool_), 300.0, None)
    specs = (TileSpec(224, 0.5, min_tissue=0), TileSpec(100, 0.5, min_tissue=0.5))
    grids = [coarse, *(plan_grid(slide.info, spec, everywhere) for spec in specs)]
    assert [grid.level for grid in grids] == [1, 0, 0]
    done, ends = [0, 0, 0], []
    for tiles in decode_tiles(slide, grids, batch=30, threads=2):
        grid, last = grids[tiles.grid], tiles.rows + len(tiles.pixels)
        assert tiles.rows == done[tiles.grid]
        expected = np.empty_like(tiles.pixels)
        slide.read(grid.level, grid.xy[tiles.rows : last], grid.read_px, expected)
        assert np.array_equal(tiles.pixels, expected)
        done[tiles.grid] = last
        ends.append(grid.coords[last - 1, 1] + grid.tile_px_level0)
        tiles.release()
    assert done == [len(grid.xy) for grid in grids]
    assert ends == sorted(ends)
    assert list(decode_tiles(slide, [], batch=30, threads=2)) == []


def test_memory_is_a_ring_of_slabs(mosaic: tuple[SlideReader, TileGrid]) -> None:
    slide, grid = mosaic
    slabs = set()
    for tiles in decode_tiles(slide, grid, batch=8, threads=2, slabs=3):
        slabs.add(tiles.pixels.__array_interface__["data"][0])
        tiles.release()
        tiles.release()
    assert len(slabs) == 3


def test_a_held_batch_keeps_its_pixels(mosaic: tuple[SlideReader, TileGrid]) -> None:
    slide, grid = mosaic
    batches = decode_tiles(slide, grid, batch=8, threads=2, slabs=2)
    held = next(batches)
    before = held.pixels.copy()
    for tiles in batches:
        tiles.release()
    assert np.array_equal(held.pixels, before)


def test_release_from_another_thread_wakes_the_iterator(
    mosaic: tuple[SlideReader, TileGrid],
) -> None:
    slide, grid = mosaic
    batches = decode_tiles(slide, grid, batch=8, threads=1, slabs=2)
    held = [next(batches), next(batches)]
    timer = threading.Timer(0.2, held[0].release)
    timer.start()
    third = next(batches)
    assert third.rows == 16
    timer.join()
    batches.close()


def test_early_close_and_errors_leave_no_threads(mosaic: tuple[SlideReader, TileGrid]) -> None:
    slide, grid = mosaic
    batches = decode_tiles(slide, grid, batch=8, threads=2)
    next(batches)
    assert decoders()
    batches.close()
    assert not decoders()

    def fail() -> None:
        for _ in decode_tiles(slide, grid, batch=8, threads=2):
            raise KeyError("the consumer's own")

    with pytest.raises(KeyError):
        fail()
    assert not decoders()


def test_bad_tiles_are_counted_and_kept(slide_file: SlideFile, tmp_path: Path) -> None:
    import tifffile

    path = slide_file("mosaic.tif")
    raw = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        for source in (40, 41):
            at = tiff.pages[0].dataoffsets[source]
            raw[at + 700 : at + 900] = b"\xff" * 100 + b"\x01" * 100
    hurt = tmp_path / "hurt.tif"
    hurt.write_bytes(raw)
    everywhere = TissueMask(np.ones((8, 10), np.bool_), 300.0, None)
    stats = DecodeStats()
    with open_slide(hurt) as slide:
        grid = plan_grid(slide.info, TileSpec(min_tissue=0), everywhere)
        status = np.concatenate(
            [
                (tiles.status.copy(), tiles.release())[0]
                for tiles in decode_tiles(slide, grid, batch=64, threads=2, stats=stats)
            ]
        )
    assert np.flatnonzero(status).tolist() == [40, 41]
    assert stats.bad == 2
