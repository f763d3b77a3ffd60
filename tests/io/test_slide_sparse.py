"""Tiles without bytes: background where a file leaves it out, made from finer levels by Aperio."""

from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from hmil_fast.errors import SlideError
from hmil_fast.io.slide import TileStatus, open_slide
from hmil_fast.io.tiles.tissue import find_tissue

SlideFile = Callable[[str], Path]
TILE = 128
READERS = {
    "jpeg": ("nvimagecodec", "cucim", "openslide"),
    "uncompressed": ("raw", "cucim", "openslide"),
    "jpeg2000": ("nvimagecodec", "cucim"),
    "lzw": ("openslide",),
    "deflate": ("openslide",),
}
APERIO = "Aperio Image Library v11.2.1\r\n{w}x{h} [0,0 {w}x{h}] ({t}x{t})|AppMag = 20|MPP = 0.5"


def installed(*readers: str) -> list[str]:
    return [name for name in readers if name != "cucim" or find_spec(name)]


def region(slide_file: SlideFile, wide: int, high: int) -> np.ndarray:
    """Tissue on glass."""
    with openslide.OpenSlide(slide_file("CMU-1-Small-Region.svs")) as slide:
        return np.asarray(slide.read_region((300, 400), 0, (wide, high)).convert("RGB"))


def write(path: Path, pixels: np.ndarray, codec: str, *, big: bool = False, **more: object) -> None:
    options = {"tile": (TILE, TILE), "metadata": None, "resolution": (20_000, 20_000)} | more
    if codec == "jpeg2000":
        edges = [range(0, side, TILE) for side in pixels.shape[:2]]
        padded = np.pad(pixels, ((0, TILE), (0, TILE), (0, 0)))
        tiles = (padded[y : y + TILE, x : x + TILE].copy() for y, x in product(*edges))
        pixels_or_tiles = (imagecodecs.jpeg2k_encode(t, codecformat="J2K", level=0) for t in tiles)
        options |= {"shape": pixels.shape, "dtype": np.uint8, "compression": 33005}
        tifffile.imwrite(path, pixels_or_tiles, photometric="rgb", bigtiff=big, **options)
        return
    names = {"uncompressed": None, "deflate": "zlib"}
    options |= {"compression": names.get(codec, codec), "photometric": "rgb"}
    tifffile.imwrite(path, pixels, bigtiff=big, **options)


def leave_out(path: Path, tiles: list[int], page: int = 0, what: str = "both") -> None:
    """Set the byte counts, the offsets or both of some tiles to 0."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tags = tiff.pages[page].tags
        for name in ("TileByteCounts", "TileOffsets"):
            if what in ("both", name):
                values = list(tags[name].value)
                tags[name].overwrite([0 if n in tiles else v for n, v in enumerate(values)])


def read(
    path: Path, reader: str | None, level: int = 0, tile: int = TILE
) -> tuple[np.ndarray, list[int]]:
    with open_slide(path, reader=reader) as slide:
        wide, high = slide.info.level_dimensions[level]
        xy = np.array([(x, y) for y in range(0, high, tile) for x in range(0, wide, tile)])
        out = np.empty((len(xy), tile, tile, 3), np.uint8)
        return out, slide.read(level, xy.astype(np.int64), tile, out).tolist()


@pytest.mark.parametrize("what", ["both", "TileByteCounts"])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("codec", READERS)
def test_a_tile_without_bytes_is_background(
    slide_file: SlideFile, tmp_path: Path, codec: str, big: bool, what: str
) -> None:
    dense, sparse = tmp_path / "dense.tif", tmp_path / "sparse.tif"
    empty = [1, 4, 6, 8, 11]
    for path in (dense, sparse):
        write(path, region(slide_file, 500, 350), codec, big=big)
    leave_out(sparse, empty, what=what)
    for reader in installed(*READERS[codec]):
        ours, status = read(sparse, reader)
        whole, _ = read(dense, reader)
        whole[empty] = 255
        assert status == [0] * 12, reader
        assert np.array_equal(ours, whole), reader
    with open_slide(sparse) as slide:
        assert "; 5 of 12 tiles hold no bytes: background" in slide.info.reader_reason


@pytest.mark.parametrize("codec", READERS)
def test_bytes_that_lie_nowhere_are_damage(
    slide_file: SlideFile, tmp_path: Path, codec: str
) -> None:
    write(path := tmp_path / "a.tif", region(slide_file, 256, 128), codec)
    leave_out(path, [1], what="TileOffsets")
    for reader in installed(*READERS[codec]):
        if codec == "uncompressed" and reader == "openslide":
            continue  # it takes the file's header for pixels
        status = read(path, reader)[1]
        kind = TileStatus.FAILED if reader == "openslide" else TileStatus.CORRUPT
        assert status == [0, kind], reader


@pytest.mark.parametrize("reader", READERS["jpeg"])
def test_a_sparse_slide_has_the_tissue_of_the_whole_one(
    slide_file: SlideFile, tmp_path: Path, reader: str
) -> None:
    pixels = region(slide_file, 1024, 1280)
    glass = [
        row * 8 + column
        for row, column in product(range(10), range(8))
        if (pixels[row * TILE :, column * TILE :][:TILE, :TILE].min(2) > 200).mean() > 0.999
    ]
    assert len(glass) > 15
    masks = []
    for name, empty in (("dense", []), ("sparse", glass)):
        write(path := tmp_path / f"{name}.tif", pixels, "jpeg")
        leave_out(path, empty)
        with open_slide(path, reader=reader) as slide:
            masks.append(find_tissue(slide.thumbnail(256), 2.0).mask)
    assert 0.3 < masks[0].mean() < 0.6
    assert (masks[0] != masks[1]).mean() < 0.02


@pytest.mark.parametrize("empty", [(1, [3, 7, 11, 15]), (0, [0, 1, 9]), (2, [1])])
def test_aperio_makes_tiles_without_bytes_from_finer_levels(
    slide_file: SlideFile, tmp_path: Path, empty: tuple[int, list[int]]
) -> None:
    pixels = region(slide_file, 1024, 1024)
    path = tmp_path / "a.svs"
    for level in range(3):
        side = 1024 >> level
        small = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX))
        if level == 2:
            small = 255 - small  # what lies below a hole in the file is not to be believed
        text = APERIO.format(w=side, h=side, t=TILE)
        write(path, small, "jpeg", append=level > 0, description=text)
    leave_out(path, empty[1], page=empty[0])
    with open_slide(path) as slide:
        assert slide.info.vendor == "aperio"
        assert slide.info.reader == "openslide"
    shrunk = Image.fromarray(pixels).resize((256, 256), Image.Resampling.BOX)
    ours, status = read(path, None, level=2)
    assert status == [0] * 4
    hole = {0: [0], 1: [1, 3], 2: [1]}[empty[0]]
    for tile, (y, x) in enumerate(product((0, 128), (0, 128))):
        right = np.asarray(shrunk.crop((x, y, x + 128, y + 128))).astype(int)
        near = np.abs(right - ours[tile]).mean() < 25
        assert near == (tile in hole)
    for reader in installed("nvimagecodec", "cucim"):
        with pytest.raises(SlideError, match="made from finer levels"):
            open_slide(path, reader=reader)


@pytest.mark.parametrize("reader", READERS["jpeg"])
def test_a_sparse_aperio_slide_of_one_level(
    slide_file: SlideFile, tmp_path: Path, reader: str
) -> None:
    text = APERIO.format(w=256, h=256, t=TILE)
    write(path := tmp_path / "a.svs", region(slide_file, 256, 256), "jpeg", description=text)
    leave_out(path, [2])
    pixels, status = read(path, reader)
    assert status == [0] * 4
    assert [bool((tile == 255).all()) for tile in pixels] == [False, False, True, False]
