"""The TIFF's tag decides what a tile's channels are: every reader shows OpenSlide's colours."""

import io
import struct
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from hmil_fast.errors import SlideError
from hmil_fast.io.slide import SlideReader, TileStatus, open_slide
from hmil_fast.io.tiles.tissue import find_tissue

SlideFile = Callable[[str], Path]
TILE = 64
JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
MARKERS = list(
    product((b"", JFIF), (None, 0, 1, 2), (b"\1\2\3", b"RGB", b"rgb", b"\0\1\2", b"\1\x22\x23"))
)
DECODERS = ["nvimagecodec", *(["cucim"] if find_spec("cucim") else [])]
DECODERS += ["libjpeg-turbo"] if find_spec("simplejpeg") else []
STORED = {"rgb": (True, 0), "444": (False, 0), "422": (False, 1), "420": (False, 2)}


def picture(slide_file: SlideFile, wide: int, high: int) -> np.ndarray:
    with openslide.OpenSlide(slide_file("CMU-1-Small-Region.svs")) as slide:
        return np.asarray(slide.read_region((900, 1100), 0, (wide, high)).convert("RGB"))


def cut(pixels: np.ndarray) -> Iterator[np.ndarray]:
    for y, x in product(range(0, len(pixels), TILE), range(0, pixels.shape[1], TILE)):
        yield pixels[y : y + TILE, x : x + TILE]


def jpeg(
    pixels: np.ndarray,
    stored: str = "444",
    *,
    jfif: bytes = b"",
    adobe: int | None = None,
    ids: bytes = b"\1\2\3",
) -> tuple[bytes, bytes]:
    """One tile without its tables, and these."""
    keep_rgb, subsampling = STORED[stored]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(
        buffer, "JPEG", quality=85, subsampling=subsampling, keep_rgb=keep_rgb
    )
    made = buffer.getvalue()
    kept = {"head": b"", "tables": b""}
    at = 2
    while made[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(made[at + 2 : at + 4])
        segment = bytearray(made[at:end])
        if made[at + 1] == 0xC0:
            segment[10::3] = ids
        kind = "tables" if made[at + 1] in (0xC4, 0xDB) else "head"
        if not 0xE0 <= made[at + 1] <= 0xEF:
            kept[kind] += segment
        at = end
    scan = bytearray(made[at:])
    scan[5:11:2] = ids
    said = b"" if adobe is None else b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0" + bytes([adobe])
    return jfif + said + kept["head"] + scan, kept["tables"]


def write(
    path: Path, streams: list[bytes], shape: tuple[int, ...], tag: str, tables: bytes = b""
) -> None:
    options: dict[str, Any] = {"jpegtables": b"\xff\xd8" + tables + b"\xff\xd9"} if tables else {}
    options["compressionargs"] = {"outcolorspace": tag}  # the tag; the streams stay as they are
    tifffile.imwrite(
        path,
        iter(streams),
        shape=shape,
        dtype=np.uint8,
        tile=(TILE, TILE),
        compression=7,
        photometric=tag,
        metadata=None,
        **options,
    )


def read(slide: SlideReader) -> tuple[np.ndarray, np.ndarray]:
    """All tiles of level 0, and their status."""
    wide, high = slide.info.level_dimensions[0]
    xy = np.array([(x, y) for y in range(0, high, TILE) for x in range(0, wide, TILE)], np.int64)
    out = np.empty((len(xy), TILE, TILE, 3), np.uint8)
    return out, slide.read(0, xy, TILE, out)


@pytest.mark.parametrize("abbreviated", [False, True])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tag", ["rgb", "ycbcr"])
def test_the_tag_decides(
    slide_file: SlideFile, tmp_path: Path, tag: str, stored: str, abbreviated: bool
) -> None:
    pixels = picture(slide_file, 8 * TILE, 5 * TILE)
    streams = []
    for tile, (jfif, adobe, ids) in zip(cut(pixels), MARKERS, strict=True):
        body, tables = jpeg(tile, stored, jfif=jfif, adobe=adobe, ids=ids)
        streams.append(b"\xff\xd8" + (b"" if abbreviated else tables) + body)
    # a segment among the tables decides no more than one in a tile
    tables = JFIF + tables if abbreviated else b""
    write(path := tmp_path / "a.tif", streams, pixels.shape, tag, tables)
    with open_slide(path, reader="openslide") as slide:
        expected, status = read(slide)
    # libjpeg warns of Adobe's transform 2, unless a JFIF segment made it unnecessary
    assert np.array_equal(status > 0, [adobe == 2 and not jfif for jfif, adobe, _ in MARKERS])
    for reader in DECODERS:
        with open_slide(path, reader=reader) as slide:
            assert slide.info.reader == reader
            ours, our_status = read(slide)
        assert np.array_equal(our_status > 0, status > 0), reader
        assert np.array_equal(ours, expected), reader
    if (tag == "rgb") == (stored == "rgb"):
        good = np.stack(list(cut(pixels)))[status == 0].astype(int)
        shift = good.mean((0, 1, 2)) - expected[status == 0].mean((0, 1, 2))
        assert np.abs(shift).max() < 2


@pytest.mark.parametrize(("tag", "stored", "code"), [("rgb", "444", 6), ("ycbcr", "rgb", 2)])
def test_colours_that_the_tag_gets_wrong_are_noticed_and_the_fix_mends_them(
    slide_file: SlideFile, tmp_path: Path, tag: str, stored: str, code: int
) -> None:
    with openslide.OpenSlide(slide_file("CMU-1-Small-Region.svs")) as slide:
        pixels = np.asarray(slide.read_region((300, 400), 0, (1024, 1024)).convert("RGB"))
    streams = []
    for tile in cut(pixels):
        body, tables = jpeg(tile, stored)
        streams.append(b"\xff\xd8" + tables + body)
    write(path := tmp_path / "a.tif", streams, pixels.shape, tag)
    with open_slide(path) as reader:
        tissue = find_tissue(reader.thumbnail(256), 2.0)
    assert "the glass looks coloured" in (tissue.note or "")
    assert f"tiffset -s 262 {code} COPY" in tissue.fix
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags[262].overwrite(code)
    with open_slide(path) as reader:
        tissue = find_tissue(reader.thumbnail(256), 2.0)
    assert tissue.note is None
    assert 0.3 < tissue.mask.mean() < 0.6


def spoilt(kind: str, made: bytes) -> bytes:
    other_jfif = JFIF.replace(b"\0\1\1", b"\0\2\1")
    noise = np.random.default_rng(0).integers(0, 256, 3000, np.uint8).tobytes()
    half = len(made) // 2
    return {
        "zeros behind the end": made + bytes(4096),
        "fill bytes behind the end": made + b"\xff" * 100,
        "junk behind the end": made + noise,
        "zeros and junk behind the end": made + bytes(9000) + noise,
        "another picture behind the end": made + made,
        "a comment full of zeros": made[:2] + b"\xff\xfe\x20\x02" + bytes(0x2000) + made[2:],
        "fill bytes before a segment": made[:2] + b"\xff\xff\xff" + made[2:],
        "a JFIF segment of another version": made[:2] + other_jfif + made[2:],
        "an end amid the data": made[:half] + b"\xff\xd9" + made[half:],
        "an end a little too soon": made[:-30] + b"\xff\xd9" + made[-30:],
        "no end": made[:-2],
        "a byte before the start": b"\0" + made,
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "good"),
    [
        ("zeros behind the end", True),
        ("fill bytes behind the end", True),
        ("junk behind the end", True),
        ("zeros and junk behind the end", True),
        ("another picture behind the end", True),
        ("a comment full of zeros", True),
        ("fill bytes before a segment", True),
        ("a JFIF segment of another version", False),
        ("an end amid the data", False),
        ("an end a little too soon", False),
        ("no end", False),
        ("a byte before the start", False),
    ],
)
def test_rare_tiles_are_read_as_openslide_reads_them(
    slide_file: SlideFile, tmp_path: Path, kind: str, good: bool
) -> None:
    pixels = picture(slide_file, 4 * TILE, 3 * TILE)
    streams = []
    for number, tile in enumerate(cut(pixels)):
        body, tables = jpeg(tile, "420")
        made = b"\xff\xd8" + tables + body
        streams.append(spoilt(kind, made) if number % 3 == 1 else made)
    write(path := tmp_path / "a.tif", streams, pixels.shape, "ycbcr")
    with open_slide(path, reader="openslide") as slide:
        expected, status = read(slide)
    assert np.array_equal(status > 0, [not good and number % 3 == 1 for number in range(12)])
    for reader in DECODERS:
        with open_slide(path, reader=reader) as slide:
            ours, our_status = read(slide)
        assert set(our_status.tolist()) == {0} if good else {0, TileStatus.CORRUPT}
        assert np.array_equal(our_status > 0, status > 0), reader
        assert np.array_equal(ours, expected), reader


@pytest.mark.parametrize(("bad", "asked"), [(30, True), (230, False)])
def test_openslide_is_not_asked_of_bad_tiles_for_ever(
    slide_file: SlideFile, tmp_path: Path, bad: int, asked: bool
) -> None:
    pixels = picture(slide_file, 16 * TILE, 16 * TILE)
    body, tables = jpeg(pixels[:TILE, :TILE], "420")
    made = b"\xff\xd8" + tables + body
    streams = [made[:-2]] * bad + [spoilt("junk behind the end", made)] * (256 - bad)
    write(path := tmp_path / "a.tif", streams, pixels.shape, "ycbcr")
    with open_slide(path) as slide:
        _, status = read(slide)
    assert np.array_equal(status > 0, (np.arange(256) < bad) | (not asked))


@pytest.mark.parametrize(
    ("how", "tag", "good"),
    [
        ({"lossless": True}, "rgb", True),
        ({"lossless": True}, "ycbcr", False),
        ({"lossless": True, "bitspersample": 12}, "rgb", False),
        ({"bitspersample": 12}, "ycbcr", False),
        ({"progressive": True}, "ycbcr", True),
    ],
)
def test_rare_codings_are_read_as_openslide_reads_them(
    slide_file: SlideFile, tmp_path: Path, how: dict[str, Any], tag: str, good: bool
) -> None:
    pixels = picture(slide_file, 2 * TILE, TILE)
    streams = []
    for tile in cut(pixels):
        if "progressive" in how:
            Image.fromarray(tile).save(buffer := io.BytesIO(), "JPEG", quality=85, **how)
            streams.append(buffer.getvalue())
        else:
            values = tile.astype(np.uint16) << 4 if "bitspersample" in how else tile.copy()
            streams.append(imagecodecs.jpeg8_encode(values, **how))
    write(path := tmp_path / "a.tif", streams, pixels.shape, tag)
    with open_slide(path, reader="openslide") as slide:
        expected, status = read(slide)
    assert status.tolist() == [0 if good else TileStatus.FAILED] * 2
    for reader in DECODERS:
        with open_slide(path, reader=reader) as slide:
            ours, status = read(slide)
        assert status.tolist() == [0 if good else TileStatus.CORRUPT] * 2, reader
        assert np.array_equal(ours, expected), reader
    if "lossless" in how and good:
        assert np.array_equal(ours, np.stack(list(cut(pixels))))


def retag(path: Path, code: int, value: int) -> None:
    """Write a classic TIFF's first directory anew with one SHORT tag more, or another one."""
    raw = bytearray(path.read_bytes())
    (at,) = struct.unpack_from("<I", raw, 4)
    (count,) = struct.unpack_from("<H", raw, at)
    following = bytes(raw[at + 2 + 12 * count :][:4])
    tags = {}
    for n in range(count):
        entry = bytes(raw[at + 2 + 12 * n :][:12])
        tags[struct.unpack_from("<H", entry)[0]] = entry
    tags[code] = struct.pack("<HHIHH", code, 3, 1, value, 0)
    raw += bytes(len(raw) % 2)
    struct.pack_into("<I", raw, 4, len(raw))
    raw += struct.pack("<H", len(tags)) + b"".join(tags[key] for key in sorted(tags)) + following
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("code", "value"),
    [(266, 2), (274, 3), (274, 6), (338, 0), (339, 2), (284, 2), (317, 2), (262, 0), (262, 3)],
)
def test_uncompressed_pixels_with_a_tag_that_changes_them_are_openslides(
    slide_file: SlideFile, tmp_path: Path, code: int, value: int
) -> None:
    """FillOrder, Orientation, ExtraSamples, SampleFormat, planes, Predictor, Photometric."""
    pixels = picture(slide_file, 2 * TILE, TILE)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, tile=(TILE, TILE), photometric="rgb", metadata=None)
    retag(path, code, value)
    with open_slide(path) as slide:
        assert slide.info.reader == "openslide"
    for reader in ("raw", *DECODERS):
        with pytest.raises(SlideError, match=r"not upright 8-bit|predictor 2|not trusted"):
            open_slide(path, reader=reader)


@pytest.mark.parametrize(
    ("photometric", "compression"),
    [
        ("ycbcr", None),
        ("ycbcr", "zlib"),
        ("ycbcr", "lzw"),
        ("miniswhite", None),
        ("minisblack", None),
        ("minisblack", "jpeg"),
        ("palette", None),
        ("separated", None),
        ("separated", "lzw"),
    ],
)
def test_other_colour_models_are_openslides(
    slide_file: SlideFile, tmp_path: Path, photometric: str, compression: str | None
) -> None:
    rgb = Image.fromarray(picture(slide_file, 2 * TILE, TILE))
    ramp = np.arange(0, 65536, 257, np.uint16)
    pixels, right = {
        "ycbcr": (rgb.convert("YCbCr"), rgb),
        "miniswhite": (rgb.convert("L").point(lambda v: 255 - v), rgb.convert("L")),
        "minisblack": (rgb.convert("L"), rgb.convert("L")),
        "palette": (rgb.convert("L"), rgb.convert("L")),
        "separated": (rgb.convert("CMYK"), rgb),
    }[photometric]
    path = tmp_path / "a.tif"
    options: dict[str, Any] = {
        "ycbcr": {"subsampling": (1, 1)},
        "palette": {"colormap": np.stack([ramp] * 3)},
    }.get(photometric, {})
    tifffile.imwrite(
        path,
        np.asarray(pixels),
        tile=(TILE, TILE),
        photometric=photometric,
        compression=compression,
        metadata=None,
        **options,
    )
    with open_slide(path) as slide:
        assert slide.info.reader == "openslide"
        ours, status = read(slide)
    assert not status.any()
    expected = np.stack(list(cut(np.asarray(right.convert("RGB")).astype(int))))
    assert np.abs(ours - expected).max() <= (20 if compression == "jpeg" else 4)
    for reader in ("raw", *DECODERS):
        with pytest.raises(SlideError, match=r"not upright 8-bit|YCbCr|not trusted"):
            open_slide(path, reader=reader)
