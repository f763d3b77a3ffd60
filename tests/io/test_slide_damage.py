"""Bad files and bad tiles: one line for a person, never a crash, never garbage pixels."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from hmil_fast.errors import SlideError
from hmil_fast.io.slide import TileStatus, open_slide
from hmil_fast.io.slide.jpeg_check import Look, jpeg_tables, look_at_jpeg

SlideFile = Callable[[str], Path]

# run in a child process, so that a native crash fails the test instead of ending it
CHILD = """
import json, sys
from pathlib import Path
import numpy as np
from hmil_fast.errors import SlideError
from hmil_fast.io.slide import open_slide

for name in sys.argv[1:]:
    try:
        slide = open_slide(Path(name))
    except SlideError as error:
        print(json.dumps({"file": Path(name).name, "what": error.what, "fix": error.fix}))
        continue
    with slide:
        bad, total = 0, 0
        for level, (wide, high) in enumerate(slide.info.level_dimensions):
            xy = np.array([(x, y) for y in range(0, high, 256) for x in range(0, wide, 256)])
            out = np.empty((len(xy), 256, 256, 3), np.uint8)
            bad += int((slide.read(level, xy, 256, out) > 0).sum())
            total += int(out.sum(dtype=np.int64))
        slide.thumbnail(200)
    print(json.dumps({"file": Path(name).name, "bad": bad, "sum": total}))
"""


def open_in_child(paths: list[Path]) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "name",
    [
        "CMU-1-Small-Region.svs",
        "cmu1_small_pyramid.tif",
        "cmu1_jpeg2000.svs",
        "dapi_small.ndpi",
    ],
)
def test_cut_off_copies(slide_file: SlideFile, tmp_path: Path, name: str) -> None:
    path = slide_file(name)
    whole = path.read_bytes()
    kept = [3, 8, 100, *(int(part * len(whole)) for part in (0.2, 0.5, 0.8, 0.95, 0.999))]
    cuts = [tmp_path / f"cut{length}-{name}" for length in kept]
    for cut, length in zip(cuts, kept, strict=True):
        cut.write_bytes(whole[:length])
    almost = tmp_path / f"almost-{name}"
    almost.write_bytes(whole[:-1])
    *refused, last, good = open_in_child([*cuts, almost, path])
    for answer in refused:
        assert "what" in answer, answer
        assert "\n" not in str(answer["what"])
        assert answer["fix"]
    assert good["bad"] == 0
    assert "what" in last or last["sum"] == good["sum"]


def test_files_that_are_no_slides(slide_file: SlideFile, tmp_path: Path) -> None:
    (tmp_path / "text.svs").write_text("not a slide\n" * 100)
    (tmp_path / "text.ndpi").write_text("not a slide\n" * 100)
    (tmp_path / "empty.svs").touch()
    (tmp_path / "folder.svs").mkdir()
    tifffile.imwrite(tmp_path / "strips.tif", np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "magic.tif").write_bytes(b"II*\0" + bytes(400))
    (tmp_path / "loop.tif").write_bytes(b"II*\0\x08\0\0\0\0\0\x08\0\0\0")
    names = ["text.svs", "text.ndpi", "empty.svs", "folder.svs", "strips.tif"]
    paths = [tmp_path / name for name in [*names, "magic.tif", "loop.tif", "missing.svs"]]
    paths += sorted(slide_file("CMU-1-Small-Region-dicom").glob("*.dcm"))
    answers = open_in_child(paths)
    assert len(answers) == len(paths) == 11
    for answer in answers:
        assert "\n" not in str(answer["what"])
        assert answer["fix"]
    words = ["no reader opens", "no reader opens", "is empty", "is a folder", "no reader opens"]
    words += ["damaged", "damaged", "does not exist", *3 * ["YBR_FULL"]]
    for answer, word in zip(answers, words, strict=True):
        assert word in str(answer["what"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "secret.svs"
    path.write_bytes(b"II*\0")
    path.chmod(0)
    with pytest.raises(SlideError, match="permission denied"):
        open_slide(path)


@pytest.mark.parametrize(
    ("compression", "predictor"),
    [("zlib", True), ("zlib", False), ("lzw", True), ("lzw", False), (None, False)],
)
def test_other_codecs_are_read_right(
    tmp_path: Path, compression: str | None, predictor: bool
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    path = tmp_path / "codec.tif"
    tifffile.imwrite(
        path,
        pixels,
        tile=(128, 128),
        compression=compression,
        predictor=predictor,
        photometric="rgb",
    )
    with open_slide(path) as slide:
        assert slide.info.reader == ("openslide" if compression else "raw")
        out = np.empty((1, 500, 500, 3), np.uint8)
        assert slide.read(0, np.zeros((1, 2), np.int64), 500, out).tolist() == [0]
    assert np.array_equal(out[0, :300], pixels)
    assert (out[0, 300:] == 255).all()


def scramble(raw: bytearray, at: int, count: int) -> None:
    noise = np.random.default_rng(3).integers(0, 256, count - count // 4, np.uint8)
    raw[at + count // 4 : at + count] = noise.tobytes()


def cut_tile_bytes(raw: bytearray, at: int, count: int) -> None:
    raw[at + count // 2 : at + count] = bytes(count - count // 2)


def enlarge_frame(raw: bytearray, at: int, count: int) -> None:
    frame = raw.index(b"\xff\xc0", at, at + count)
    raw[frame + 5 : frame + 9] = b"\x40\x00\x40\x00"


def leave_hole(raw: bytearray, at: int, count: int) -> None:
    raw[at + count // 2 : at + count // 2 + 4096] = bytes(4096)


def spoil_sampling(raw: bytearray, at: int, count: int) -> None:
    raw[raw.index(b"\xff\xc0", at, at + count) + 11] = 0


def name_no_table(raw: bytearray, at: int, count: int) -> None:
    raw[raw.index(b"\xff\xda", at, at + count) + 6] = 0x77


@pytest.mark.parametrize("reader", ["nvimagecodec", "cucim"])
@pytest.mark.parametrize(
    "damage",
    [scramble, cut_tile_bytes, enlarge_frame, leave_hole, spoil_sampling, name_no_table],
)
def test_a_corrupt_tile_spoils_just_the_tiles_that_touch_it(
    slide_file: SlideFile,
    tmp_path: Path,
    damage: Callable[[bytearray, int, int], None],
    reader: str,
) -> None:
    grid = 200
    path = slide_file("cmu1_small_pyramid.tif")
    with tifffile.TiffFile(path) as tiff:
        across = -(-2220 // 256)
        source = 5 * across + 4
        at, count = tiff.pages[0].dataoffsets[source], tiff.pages[0].databytecounts[source]
    raw = bytearray(path.read_bytes())
    damage(raw, at, count)
    hurt = tmp_path / "hurt.tif"
    hurt.write_bytes(raw)
    xy = np.array([(x, y) for y in range(0, 2967, grid) for x in range(0, 2220, grid)], np.int64)
    bad, good = (np.empty((len(xy), grid, grid, 3), np.uint8) for _ in range(2))
    with open_slide(hurt, reader=reader) as slide:
        status = slide.read(0, xy, grid, bad)
    with open_slide(path) as slide:
        slide.read(0, xy, grid, good)
    x, y = xy.T
    touches = (x < 5 * 256) & (x + grid > 4 * 256) & (y < 6 * 256) & (y + grid > 5 * 256)
    assert np.array_equal(status != 0, touches)
    assert set(status[touches].tolist()) == {TileStatus.CORRUPT}
    assert (bad[touches] == 255).all()
    assert np.array_equal(bad[~touches], good[~touches])


@pytest.mark.skipif(find_spec("simplejpeg") is None, reason="simplejpeg is not installed")
@pytest.mark.parametrize("reader", ["strict", "libjpeg-turbo"])
def test_strict_tiles_are_those_that_openslide_reads(
    slide_file: SlideFile, tmp_path: Path, reader: str
) -> None:
    path = slide_file("cmu1_small_pyramid.tif")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    raw = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for at, count in places:
        raw[at + int(rng.integers(count // 2, count - 2))] ^= 1 << int(rng.integers(8))
    hurt = tmp_path / "hurt.tif"
    hurt.write_bytes(raw)
    xy = np.array([(n % 9 * 256, n // 9 * 256) for n in range(len(places))], np.int64)
    seen = {}
    for name in ("openslide", reader, "nvimagecodec"):
        with open_slide(hurt, reader=name) as slide:
            assert slide.info.reader == ("libjpeg-turbo" if name == "strict" else name)
            out = np.empty((len(xy), 256, 256, 3), np.uint8)
            seen[name] = slide.read(0, xy, 256, out) > 0, out
    assert np.array_equal(seen[reader][0], seen["openslide"][0])
    assert np.array_equal(seen[reader][1], seen["openslide"][1])
    assert seen[reader][0].sum() > 2 * seen["nvimagecodec"][0].sum()


@pytest.mark.parametrize(
    ("compression", "reader"), [(None, "raw"), ("lzw", "openslide"), (33005, "nvimagecodec")]
)
def test_strict_changes_nothing_for_what_is_no_jpeg(
    tmp_path: Path, compression: str | int | None, reader: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    options: dict[str, Any] = {"data": pixels}
    if compression == 33005:
        stream = imagecodecs.jpeg2k_encode(pixels, codecformat="J2K", level=0)
        options = {"data": iter([stream]), "shape": pixels.shape, "dtype": np.uint8}
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, tile=(128, 128), compression=compression, photometric="rgb", metadata=None, **options
    )
    with open_slide(path, reader="strict") as slide:
        assert slide.info.reader == reader


@pytest.mark.parametrize("side", [64, 256, 1024, 2048])
@pytest.mark.parametrize("optimize", [False, True])
def test_a_blank_tile_is_no_hole(side: int, optimize: bool) -> None:
    for value, subsampling in product((0, 128, 255), (0, 2)):
        blank = Image.new("RGB", (side, side), (value,) * 3)
        buffer = io.BytesIO()
        blank.save(buffer, "JPEG", optimize=optimize, subsampling=subsampling)
        assert look_at_jpeg(buffer.getvalue(), (side, side)) == Look.WHOLE


def test_tables_that_hold_a_frame_are_refused(slide_file: SlideFile) -> None:
    with tifffile.TiffFile(slide_file("CMU-1-Small-Region.svs")) as tiff:
        tables = tiff.pages[0].jpegtables
        tiff.filehandle.seek(tiff.pages[0].dataoffsets[7])
        tile = tiff.filehandle.read(tiff.pages[0].databytecounts[7])
    huge = b"\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x11\x00\x02\x11\x00\x03\x11\x00"
    assert look_at_jpeg(tile, (240, 240), jpeg_tables(tables)) == Look.WHOLE
    assert look_at_jpeg(tile, (240, 240)) == Look.ODD
    for bad in (tables[:2] + huge + tables[2:], tables[:-1], tables[2:], tables[:40] + tables[41:]):
        assert jpeg_tables(bad) is None


def test_a_corrupt_jpeg2000_tile(slide_file: SlideFile, tmp_path: Path) -> None:
    path = slide_file("cmu1_jpeg2000.svs")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        raw = bytearray(path.read_bytes())
        scramble(raw, page.dataoffsets[13], page.databytecounts[13])
    hurt = tmp_path / "hurt.svs"
    hurt.write_bytes(raw)
    xy = np.array([(x * 256, 2 * 256) for x in range(-(-1303 // 256))], np.int64)
    with open_slide(hurt) as slide:
        status = slide.read(0, xy, 256, np.empty((len(xy), 256, 256, 3), np.uint8))
    assert status.tolist() == [0, TileStatus.CORRUPT, *[0] * 4]


def test_openslide_bad_tile_leaves_the_others(slide_file: SlideFile, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    path = tmp_path / "lzw.tif"
    tifffile.imwrite(path, pixels, tile=(256, 256), compression="lzw", photometric="rgb")
    with tifffile.TiffFile(path) as tiff:
        at, count = tiff.pages[0].dataoffsets[1], tiff.pages[0].databytecounts[1]
    raw = bytearray(path.read_bytes())
    scramble(raw, at, count)
    path.write_bytes(raw)
    xy = np.array([(0, 0), (256, 0), (0, 256), (256, 256)] * 2, np.int64)
    out = np.empty((8, 256, 256, 3), np.uint8)
    with open_slide(path) as slide:
        assert slide.info.reader == "openslide"
        assert slide.read(0, xy, 256, out).tolist() == [0, TileStatus.FAILED, 0, 0] * 2
    assert np.array_equal(out[3], pixels[256:, 256:])
    assert (out[1] == 255).all()


def test_only_some_bad_blocks_of_a_thumbnail_are_read_in_pieces(tmp_path: Path) -> None:
    """Each piece may make OpenSlide open the file anew, and a damaged slide has many."""
    path = tmp_path / "bad.tif"
    pixels = np.full((18 * 256, 18 * 256, 3), 240, np.uint8)
    form = {"compression": "jpeg", "photometric": "rgb", "metadata": None}
    tifffile.imwrite(path, pixels, tile=(256, 256), **form)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        counts = np.array(tiff.pages[0].databytecounts).reshape(18, 18)
        counts[::2, ::2] = 9  # 81 blocks, each with one bad tile among four
        tiff.pages[0].tags["TileByteCounts"].overwrite(counts.ravel().tolist())
    with open_slide(path) as slide:
        thumbnail = slide.thumbnail(18 * 256)
    blocks = thumbnail.reshape(9, 512, 9, 512, 3).mean((1, 3, 4))
    assert sorted(np.unique(blocks, return_counts=True)[1].tolist()) == [81 - 64, 64]
    assert (blocks[0, 0], blocks[-1, -1]) == ((240 * 3 + 128) / 4, 128)
