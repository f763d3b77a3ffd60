"""What every reader must do alike: pixels, bad tiles, edges, batches, threads, handles."""

import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from hmil_fast.errors import SlideError, UsageError
from hmil_fast.io.slide import SlideReader, TileStatus, open_slide
from hmil_fast.io.tiles.decode import decode_tiles
from hmil_fast.io.tiles.grid import TileSpec, plan_grid
from hmil_fast.io.tiles.tissue import TissueMask

SlideFile = Callable[[str], Path]
PYRAMID = "cmu1_small_pyramid.tif"
READERS = ["nvimagecodec", *(["cucim"] if find_spec("cucim") else []), "openslide"]
READERS += ["libjpeg-turbo"] if find_spec("simplejpeg") else []
EVERYWHERE = TissueMask(np.ones((8, 10), np.bool_), 300.0, None)


def read(
    slide: SlideReader, xy: Sequence[tuple[int, int]], size: int, level: int = 0
) -> np.ndarray:
    out = np.full((len(xy), size, size, 3), 7, np.uint8)
    assert not slide.read(level, np.array(xy, np.int64), size, out).any()
    return out


def truth(path: Path, xy: Sequence[tuple[int, int]], size: int, level: int = 0) -> np.ndarray:
    """OpenSlide's pixels on white; for levels whose downsample is a power of two."""
    tiles = []
    with openslide.OpenSlide(path) as slide:
        for x, y in xy:
            tile = np.asarray(slide.read_region((x << level, y << level), level, (size, size)))
            tiles.append(np.where(tile[..., 3:] == 0, 255, tile[..., :3]))
    return np.stack(tiles)


def corners_of(slide: SlideReader, level: int, size: int) -> list[tuple[int, int]]:
    """The four corners, past two of them, and some anywhere."""
    wide, high = slide.info.level_dimensions[level]
    some = np.random.default_rng(level).integers((wide, high), size=(6, 2)).tolist()
    ends = [(0, 0), (wide - size, high - size), (wide - 90, 0), (3, high - 70)]
    return [(int(x), int(y)) for x, y in [*ends, *some]]


def stain(wide: int, high: int) -> np.ndarray:
    """Smooth colours with some noise."""
    rng = np.random.default_rng(5)
    small = Image.fromarray(rng.integers(60, 250, (9, 9, 3), np.uint8))
    smooth = np.asarray(small.resize((wide, high), Image.Resampling.BICUBIC), np.int64)
    return (smooth + rng.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8)


def jpeg_files(pixels: np.ndarray, tile: int, *, rgb: bool) -> Iterator[bytes]:
    jfif = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
    high, wide = (-(-side // tile) * tile for side in pixels.shape[:2])
    padded = np.zeros((high, wide, 3), np.uint8)
    padded[: len(pixels), : pixels.shape[1]] = pixels
    for y in range(0, high, tile):
        for x in range(0, wide, tile):
            buffer = io.BytesIO()
            picture = Image.fromarray(padded[y : y + tile, x : x + tile])
            picture.save(buffer, "JPEG", quality=85, subsampling=0 if rgb else 2, keep_rgb=rgb)
            made = buffer.getvalue()
            yield made if b"JFIF" in made[:20] else made[:2] + jfif + made[2:]


def write(path: Path, kind: str, tile: int = 256) -> np.ndarray:
    """A slide of 700 × 900 px, its tiles written as some scanners do; returns its content."""
    pixels = stain(700, 900)
    options: dict[str, Any] = {"tile": (tile, tile), "resolution": (20_000, 20_000)}
    if kind in ("jfif", "rgb-jfif"):  # each tile a JPEG file of its own with a JFIF segment
        streams = list(jpeg_files(pixels, tile, rgb=kind == "rgb-jfif"))
        options |= {"shape": pixels.shape, "dtype": np.uint8}
        if kind == "jfif":
            options["subsampling"] = (2, 2)
        colour = "ycbcr" if kind == "jfif" else "rgb"
        options["compressionargs"] = {"outcolorspace": colour}  # else the tag says YCbCr
        tifffile.imwrite(path, iter(streams), compression=7, photometric=colour, **options)
    elif kind == "uncompressed":
        tifffile.imwrite(path, pixels, photometric="rgb", **options)
    else:
        colour = "rgb" if kind == "rgb" else "ycbcr"
        options["compressionargs"] = {"level": 85, "outcolorspace": colour}
        options["photometric"] = "rgb"
        if kind == "444":
            options["subsampling"] = (1, 1)
        tifffile.imwrite(path, pixels, compression="jpeg", **options)
    return pixels


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "levels"),
    [("CMU-1-Small-Region.svs", 1), (PYRAMID, 1), ("mosaic.tif", 4)],
)
def test_pixels_of_real_slides(slide_file: SlideFile, reader: str, name: str, levels: int) -> None:
    path = slide_file(name)
    with open_slide(path, reader=reader) as slide:
        assert slide.info.reader == reader
        assert slide.info.reader_reason
        for level in range(levels):
            corners = corners_of(slide, level, 200)
            assert np.array_equal(
                read(slide, corners, 200, level), truth(path, corners, 200, level)
            )


@pytest.mark.parametrize(("reader", "most"), [("nvimagecodec", 0), ("cucim", 1), ("openslide", 0)])
def test_jpeg2000(slide_file: SlideFile, reader: str, most: int) -> None:
    path = slide_file("cmu1_jpeg2000.svs")
    corners = [(0, 0), (1000, 900), (1200, 1450), (768, 512)]
    with open_slide(path, reader=reader) as slide:
        ours = read(slide, corners, 256)
    assert np.abs(ours.astype(int) - truth(path, corners, 256)).max() <= most


@pytest.mark.parametrize("tile", [128, 240, 512])
@pytest.mark.parametrize("kind", ["420", "444", "rgb", "jfif", "rgb-jfif"])
def test_pixels_of_written_slides(tmp_path: Path, kind: str, tile: int) -> None:
    write(path := tmp_path / "written.tif", kind, tile)
    for reader in READERS:
        with open_slide(path, reader=reader) as slide:
            corners = corners_of(slide, 0, 256)
            assert np.array_equal(read(slide, corners, 256), truth(path, corners, 256)), reader


@pytest.mark.parametrize("reader", ["raw", "cucim", "openslide"])
def test_uncompressed(tmp_path: Path, reader: str) -> None:
    pixels = write(path := tmp_path / "raw.tif", "uncompressed")
    with open_slide(path) as slide:
        assert slide.info.reader == "raw"
    with open_slide(path, reader=reader) as slide:
        whole = read(slide, [(0, 0)], 900)[0]
    assert np.array_equal(whole[:, :700], pixels)
    assert (whole[:, 700:] == 255).all()


@pytest.mark.parametrize("reader", READERS)
def test_outside_is_white(slide_file: SlideFile, reader: str) -> None:
    with open_slide(slide_file(PYRAMID), reader=reader) as slide:
        wide, high = slide.info.level_dimensions[0]
        inside = read(slide, [(0, 0)], 100)[0]
        far = [(wide, 0), (0, high), (-100, 5), (10 * wide, 10 * high), (-7000, -7000)]
        left, right, *gone = read(slide, [(-40, -30), (wide - 10, high - 20), *far], 100)
        last = read(slide, [(wide - 10, high - 20)], 10)[0]
    assert (left[:30] == 255).all()
    assert (left[:, :40] == 255).all()
    assert np.array_equal(left[30:, 40:], inside[:70, :60])
    assert (right[20:] == 255).all()
    assert (right[:, 10:] == 255).all()
    assert np.array_equal(right[:10, :10], last)
    assert all((tile == 255).all() for tile in gone)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("size", [256, 224, 600])
def test_a_corrupt_tile_spoils_just_the_tiles_that_touch_it(
    slide_file: SlideFile, tmp_path: Path, reader: str, size: int
) -> None:
    path = slide_file(PYRAMID)
    with tifffile.TiffFile(path) as tiff:
        source = 5 * 9 + 4
        at, count = tiff.pages[0].dataoffsets[source], tiff.pages[0].databytecounts[source]
    raw = bytearray(path.read_bytes())
    noise = np.random.default_rng(3).integers(0, 256, count - count // 4, np.uint8)
    raw[at + count // 4 : at + count] = noise.tobytes()
    hurt = tmp_path / "hurt.tif"
    hurt.write_bytes(raw)
    xy = np.array([(x, y) for y in range(0, 2967, size) for x in range(0, 2220, size)], np.int64)
    bad, good = (np.empty((len(xy), size, size, 3), np.uint8) for _ in range(2))
    with open_slide(hurt, reader=reader) as slide:
        status = slide.read(0, xy, size, bad)
    with open_slide(path, reader=reader) as slide:
        slide.read(0, xy, size, good)
    x, y = xy.T
    touches = (x < 5 * 256) & (x + size > 4 * 256) & (y < 6 * 256) & (y + size > 5 * 256)
    assert np.array_equal(status != 0, touches)
    kind = TileStatus.FAILED if reader == "openslide" else TileStatus.CORRUPT
    assert set(status[touches].tolist()) == {kind}
    assert (bad[touches] == 255).all()
    assert np.array_equal(bad[~touches], good[~touches])


@pytest.mark.parametrize("reader", READERS)
def test_a_cut_off_file_is_refused(slide_file: SlideFile, tmp_path: Path, reader: str) -> None:
    whole = slide_file(PYRAMID).read_bytes()
    for share in (0.3, 0.9):
        cut = tmp_path / f"{share}.tif"
        cut.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(SlideError, match="damaged or cut off"):
            open_slide(cut, reader=reader)


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_shrinks_meanwhile(slide_file: SlideFile, tmp_path: Path, reader: str) -> None:
    path = tmp_path / "shrinks.tif"
    shutil.copy(slide_file(PYRAMID), path)
    with tifffile.TiffFile(path) as tiff:
        offsets = tiff.pages[0].dataoffsets
    kept = len(offsets) // 2
    xy = np.array([(n % 9 * 256, n // 9 * 256) for n in range(len(offsets))], np.int64)
    with open_slide(path, reader=reader) as slide:
        os.truncate(path, offsets[kept])
        status = slide.read(0, xy, 256, np.empty((len(xy), 256, 256, 3), np.uint8))
    assert np.array_equal(status > 0, np.arange(len(xy)) >= kept)


@pytest.mark.parametrize("reader", ["nvimagecodec", "cucim"])
def test_a_disk_that_fails_ends_the_slide_and_no_thread_waits(
    slide_file: SlideFile, reader: str
) -> None:
    slide = open_slide(slide_file(PYRAMID), reader=reader)
    grid = plan_grid(slide.info, TileSpec(200, 0.499, min_tissue=0), EVERYWHERE)
    os.close(slide._file)  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="Bad file descriptor"):
        list(decode_tiles(slide, grid, batch=64, threads=2))
    assert not [thread for thread in threading.enumerate() if "decode" in thread.name]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("batch", [1, 64, 65, 128])
def test_batches_and_threads_change_nothing(slide_file: SlideFile, reader: str, batch: int) -> None:
    with open_slide(slide_file(PYRAMID), reader=reader) as slide:
        grid = plan_grid(slide.info, TileSpec(200, 0.499, min_tissue=0), EVERYWHERE)
        expected = np.empty((len(grid.xy), 200, 200, 3), np.uint8)
        slide.read(0, grid.xy, 200, expected)
        at = 0
        for tiles in decode_tiles(slide, grid, batch=batch, threads=2):
            assert not tiles.status.any()
            assert np.array_equal(tiles.pixels, expected[at : at + len(tiles.pixels)])
            at += len(tiles.pixels)
            tiles.release()
    assert at == len(grid.xy) == 180


@pytest.mark.parametrize("reader", READERS)
def test_two_threads_read_what_one_reads(slide_file: SlideFile, reader: str) -> None:
    rng = np.random.default_rng(1)
    with open_slide(slide_file(PYRAMID), reader=reader) as slide:
        xy = rng.integers((2100, 2800), size=(80, 2))
        alone = read(slide, xy.tolist(), 100)
        shared = slide.band(0, [(xy, 100), (xy, 100)])
        got: list[np.ndarray] = []

        def work() -> None:
            out = np.empty_like(alone)
            assert not shared.read(xy, 100, out).any()
            got.append(out)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(got) == 2
    assert all(np.array_equal(alone, pixels) for pixels in got)


OPEN_500_TIMES = """
import sys
from pathlib import Path

import numpy as np

from hmil_fast.io.slide import open_slide

def use():
    with open_slide(Path(sys.argv[1]), reader=sys.argv[2]) as slide:
        slide.read(0, np.array([(300, 300)]), 64, np.empty((1, 64, 64, 3), np.uint8))
    return len(list(Path("/proc/self/fd").iterdir()))

def resident_kib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4

for _ in range(30):
    first = use()
before = resident_kib()
print(sum(use() != first for _ in range(500)), resident_kib() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_handles_and_memory_stay_flat_over_500_opens(slide_file: SlideFile, reader: str) -> None:
    # in a process where nothing else opens or closes files
    command = [sys.executable, "-c", OPEN_500_TIMES, slide_file("mosaic.tif"), reader]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    other_counts, grown_kib = map(int, said.split())
    assert other_counts == 0
    assert grown_kib < 16 * 1024  # 33 KiB an open


def test_a_reader_is_asked_for_by_name(slide_file: SlideFile) -> None:
    with pytest.raises(UsageError, match="no reader 'fastslide'"):
        open_slide(slide_file(PYRAMID), reader="fastslide")
    with pytest.raises(SlideError, match="hamamatsu"):
        open_slide(slide_file("dapi_small.ndpi"), reader="nvimagecodec")
