"""What slides say of themselves in unusual ways: read right, or told, never taken for damage."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile

from hmil_fast.errors import SlideError
from hmil_fast.io.slide import SlideReader, open_slide, require_mpp

SlideFile = Callable[[str], Path]
MPP = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}  # 0.5 µm per px
FORM = {"tile": (128, 128), "compression": "jpeg", "photometric": "rgb", "metadata": None}
X, Y, UNIT = 282, 283, 296
ASCII, SHORT, LONG, RATIONAL, SRATIONAL, FLOAT, DOUBLE = 2, 3, 4, 5, 10, 11, 12
FORMATS = {SHORT: "H", LONG: "I", RATIONAL: "I", SRATIONAL: "i", FLOAT: "f", DOUBLE: "d"}
APERIO = "Aperio Image Library v12.0.15\r\n512x640 [0,0 512x640] (128x128) JPEG/RGB Q=90"


@pytest.fixture(scope="module")
def pixels(slide_file: SlideFile) -> np.ndarray:
    """Tissue of CMU-1-Small-Region, uint8 [640, 512, 3]."""
    with openslide.OpenSlide(slide_file("CMU-1-Small-Region.svs")) as slide:
        return np.asarray(slide.read_region((500, 700), 0, (512, 640)).convert("RGB"))


def shrunk(pixels: np.ndarray, times: int) -> np.ndarray:
    high, wide = (side // times for side in pixels.shape[:2])
    cut = pixels[: high * times, : wide * times].reshape(high, times, wide, times, 3)
    return cut.mean((1, 3)).astype(np.uint8)


def write(path: Path, *pictures: np.ndarray, **how: Any) -> Path:
    """Tiled JPEG pages, the first not reduced, the others reduced."""
    with tifffile.TiffWriter(path) as tiff:
        for n, picture in enumerate(pictures):
            tiff.write(picture, **({"subfiletype": 1} if n else {}), **(FORM | how))
    return path


def set_tags(path: Path, tags: Mapping[int, tuple[int, Any] | None]) -> Path:
    """Write the first directory anew at the end, with other tags: (type, values), or None."""
    raw = bytearray(path.read_bytes())
    (at,) = struct.unpack_from("<I", raw, 4)
    (count,) = struct.unpack_from("<H", raw, at)
    entries = {
        struct.unpack_from("<H", raw, at + 2 + 12 * n)[0]: bytes(raw[at + 2 + 12 * n :][:12])
        for n in range(count)
    }
    following = raw[at + 2 + 12 * count :][:4]
    for code, value in tags.items():
        entries.pop(code, None)
        if value is None:
            continue
        kind, values = value
        data = values if kind == ASCII else struct.pack(f"<{len(values)}{FORMATS[kind]}", *values)
        number = len(values) // (2 if kind in (RATIONAL, SRATIONAL) else 1)
        place = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", len(raw))
        raw += data if len(data) > 4 else b""
        entries[code] = struct.pack("<HHI", code, kind, number) + place
    raw[4:8] = struct.pack("<I", len(raw))
    raw += struct.pack("<H", len(entries)) + b"".join(entries[code] for code in sorted(entries))
    path.write_bytes(raw + following)
    return path


def opened(path: Path, reader: str | None = None) -> SlideReader:
    slide = open_slide(path, reader=reader)
    slide.close()
    return slide


@pytest.mark.parametrize("reader", [None, "openslide"])
@pytest.mark.parametrize(
    ("tags", "mpp"),
    [
        ({X: (FLOAT, [20_000.0]), Y: (FLOAT, [20_000.0])}, 0.5),
        ({X: (DOUBLE, [20_000.0]), Y: (DOUBLE, [20_000.0])}, 0.5),
        ({X: (SHORT, [20_000]), Y: (LONG, [20_000])}, 0.5),
        ({X: (SRATIONAL, [40_000, 2]), Y: (SRATIONAL, [20_000, 1])}, 0.5),
        ({X: (ASCII, b"20000\0"), Y: (ASCII, b"2,0e4\0")}, 0.5),
        ({X: (RATIONAL, [50_800, 1]), Y: (RATIONAL, [50_800, 1]), UNIT: None}, 0.5),
        ({UNIT: (LONG, [3])}, 0.5),
        ({X: (RATIONAL, [50_800, 1]), Y: None, UNIT: (SHORT, [2])}, 0.5),
        ({X: (RATIONAL, [2_000, 1]), Y: (RATIONAL, [2_000, 1]), UNIT: (SHORT, [4])}, 0.5),
        ({X: (RATIONAL, [20_000, 1]), Y: (RATIONAL, [20_400, 1])}, 0.495),
    ],
)
def test_resolution_tags(
    tmp_path: Path,
    pixels: np.ndarray,
    tags: Mapping[int, tuple[int, Any] | None],
    mpp: float,
    reader: str | None,
) -> None:
    path = set_tags(write(tmp_path / "a.tif", pixels, **MPP), tags)
    assert require_mpp(opened(path, reader).info) == pytest.approx(mpp, abs=1e-3)


@pytest.mark.parametrize(
    ("tags", "told"),
    [
        ({X: (RATIONAL, [20_000, 0]), Y: (RATIONAL, [20_000, 0])}, "nothing usable"),
        ({X: (RATIONAL, [0, 1]), Y: (RATIONAL, [0, 1])}, "say 0 and 0"),
        ({X: (FLOAT, [float("nan")]), Y: (FLOAT, [float("inf")])}, "nothing usable"),
        ({X: (SRATIONAL, [-20_000, 1]), Y: (SRATIONAL, [-20_000, 1])}, "say -20000"),
        ({X: (ASCII, b"fine\0")}, "nothing usable and 20000"),
        ({UNIT: (SHORT, [1])}, "say 20000 and 20000, without a unit"),
        ({UNIT: (SHORT, [77])}, "without a unit"),
        ({X: None, Y: None}, "no resolution tag"),
        ({X: (RATIONAL, [40_000, 1])}, "0.25 across but 0.5 down"),
        ({X: (RATIONAL, [72, 1]), Y: (RATIONAL, [72, 1]), UNIT: (SHORT, [2])}, "352.8 µm per px"),
    ],
)
def test_what_resolution_tags_say_is_told_where_it_is_not_usable(
    tmp_path: Path, pixels: np.ndarray, tags: Mapping[int, tuple[int, Any] | None], told: str
) -> None:
    path = set_tags(write(tmp_path / "a.tif", pixels, **MPP), tags)
    with pytest.raises(SlideError, match=r"--slide-mpp 0\.5") as error:
        require_mpp(opened(path).info)
    assert told in error.value.what
    assert require_mpp(open_slide(path, fallback_mpp=0.5).info) == 0.5


@pytest.mark.parametrize(
    ("fields", "mpp"),
    [
        ("AppMag = 20|MPP = 0,2498|Left = 1.0", 0.2498),
        ("AppMag = 20|MPP = 2.498e-1", 0.2498),
        ("AppMag = 20|MPP=.2498", 0.2498),
        ("AppMag = 20|MPP = 0.2498 µm", 0.2498),
        ("Filename = case MPP = 0.25|MPP = 0.5|Left = 1.0", 0.5),
        ("Title = MPP|User = MPP 3|MPP = 0.5", 0.5),
    ],
)
def test_aperio_mpp(tmp_path: Path, pixels: np.ndarray, fields: str, mpp: float) -> None:
    text = f"{APERIO}|{fields}".encode("latin-1", "replace").replace(b"?", b"\xb5")
    path = write(tmp_path / "a.svs", pixels, description=text.replace(b"\xb5", b"u"))
    set_tags(path, {270: (ASCII, text + b"\0")})
    for reader in (None, "openslide"):
        info = opened(path, reader).info
        assert (info.vendor, info.mpp) == ("aperio", mpp)


@pytest.mark.parametrize(
    ("fields", "told", "fix"),
    [
        ("AppMag = 20|MPP = nan", "MPP = 'nan' in aperio metadata", "0.5"),
        ("AppMag = 20|MPP = inf", "MPP = 'inf'", "0.5"),
        ("AppMag = 20|MPP = 0", "states 0 µm per px", "0.5"),
        ("AppMag = 20|MPP = -0.5", "states -0.5 µm per px", "0.5"),
        ("AppMag = 20|MPP = 0.25|MPP = 0.5", "MPP = '0.25' and MPP = '0.5'", "0.5"),
        ("AppMag = 40x", "states no usable mpp (none in aperio metadata)", "0.25 if its objective"),
        ("AppMag = ?", "states no usable mpp (none in aperio metadata)", "0.5 (its true"),
    ],
)
def test_what_aperio_says_is_told_where_it_is_not_usable(
    tmp_path: Path, pixels: np.ndarray, fields: str, told: str, fix: str
) -> None:
    path = write(tmp_path / "a.svs", pixels, description=f"{APERIO}|{fields}")
    with pytest.raises(SlideError, match=r"µm per px|mpp") as error:
        require_mpp(opened(path).info)
    assert told in error.value.what
    assert f"--slide-mpp {fix}" in error.value.fix


@pytest.mark.parametrize(
    ("size", "mpp"),
    [
        ({"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}, 0.25),
        ({"PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm"}, 0.25),
        ({"PhysicalSizeX": 2.5e-4, "PhysicalSizeXUnit": "mm", "PhysicalSizeY": 0.25}, 0.25),
        ({"PhysicalSizeX": 2.5e-7, "PhysicalSizeXUnit": "m"}, 0.25),
        ({}, 0.5),  # by the resolution tag
        ({"PhysicalSizeX": 1.0, "PhysicalSizeXUnit": "pixel"}, 0.5),
    ],
)
def test_ome_xml_with_levels_in_sub_directories(
    tmp_path: Path, pixels: np.ndarray, size: dict[str, Any], mpp: float
) -> None:
    path = tmp_path / "a.ome.tif"
    form = {"tile": (128, 128), "compression": "jpeg", "photometric": "rgb"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(pixels, subifds=2, metadata={"axes": "YXS", **size}, **form, **MPP)
        for times in (2, 4):
            tiff.write(shrunk(pixels, times), subfiletype=1, **form)
    with open_slide(path) as slide, tifffile.TiffFile(path) as tiff:
        assert (slide.info.mpp, slide.info.notes) == (mpp, ())
        assert slide.info.level_dimensions == ((512, 640), (256, 320), (128, 160))
        out = np.empty((1, 160, 160, 3), np.uint8)
        assert slide.read(2, np.zeros((1, 2), np.int64), 160, out).tolist() == [0]
        assert np.abs(out[0, :, :128] - shrunk(pixels, 4).astype(int)).mean() < 8


def test_xml_entities_are_not_expanded(tmp_path: Path, pixels: np.ndarray) -> None:
    bomb = '<?xml version="1.0"?><!DOCTYPE OME [<!ENTITY a "0.25">]><OME>&a;</OME>'
    path = write(tmp_path / "a.ome.tif", pixels, description=bomb, **MPP)
    assert opened(path).info.mpp_source == "resolution tag"


def test_imagej_units(tmp_path: Path, pixels: np.ndarray) -> None:
    text = "ImageJ=1.53k\nunit=micron\n"
    path = write(tmp_path / "a.tif", pixels, description=text, resolution=(2, 2))
    assert opened(path).info.mpp == 0.5


def test_an_mpp_in_the_description_serves_where_the_tag_does_not(
    tmp_path: Path, pixels: np.ndarray
) -> None:
    path = write(tmp_path / "a.tif", pixels, description="scanned|MPP = 0.25", resolution=(72, 72))
    assert opened(path).info.mpp == 0.25


@pytest.mark.parametrize(("flags", "levels"), [((1, 1, 0), 3), ((0, 1, 1), 2), ((0, 0, 0), 1)])
def test_the_largest_page_is_the_slide_wherever_it_lies(
    tmp_path: Path, pixels: np.ndarray, flags: tuple[int, ...], levels: int
) -> None:
    path = tmp_path / "reverse.tif"
    with tifffile.TiffWriter(path) as tiff:
        for times, flag in zip((4, 2, 1), flags, strict=True):
            size = {"resolution": (20_000 / times,) * 2, "resolutionunit": "CENTIMETER"}
            tiff.write(shrunk(pixels, times), subfiletype=flag, **FORM, **size)
    with open_slide(path) as slide:
        assert slide.info.level_dimensions == ((512, 640), (256, 320), (128, 160))[:levels]
        assert slide.info.mpp == 0.5
        assert slide.info.notes == (("the slide is page 3 of 3", ""),)
        out = np.empty((1, 512, 512, 3), np.uint8)
        assert slide.read(0, np.zeros((1, 2), np.int64), 512, out).tolist() == [0]
    assert np.abs(out[0] - pixels[:512].astype(int)).mean() < 8


def test_a_slide_behind_another_page_is_not_read_by_openslide(
    tmp_path: Path, pixels: np.ndarray
) -> None:
    path = tmp_path / "a.tif"
    form = FORM | {"compression": "lzw"}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(shrunk(pixels, 4), subfiletype=1, **form, **MPP)
        tiff.write(pixels, **form, **MPP)
    with pytest.raises(SlideError, match=r"the slide is page 2 of 2.*OpenSlide reads the first"):
        open_slide(path)


@pytest.mark.parametrize("compression", ["jpeg", "lzw"])
@pytest.mark.parametrize(
    ("size", "told"),
    [
        ((200, 160), "not the slide divided by a whole number"),
        ((160, 128), "states no resolution"),
        ((640, 128), ""),
    ],
)
def test_a_macro_is_not_a_level(
    tmp_path: Path, pixels: np.ndarray, size: tuple[int, int], told: str, compression: str
) -> None:
    path, form = tmp_path / "a.tif", FORM | {"compression": compression}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(pixels, **form, **MPP)
        tiff.write(shrunk(pixels, 2), subfiletype=1, **form, **MPP)
        tiff.write(np.zeros((*size, 3), np.uint8), subfiletype=1, **form, resolution=None)
    info = opened(path).info
    assert info.level_dimensions == ((512, 640), (256, 320))
    assert [told in what for what, _ in info.notes] == [True] * bool(told)


def test_an_aperio_label_or_macro_is_not_a_level(tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / "a.svs"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(pixels, description=f"{APERIO}|MPP = 0.5", **FORM)
        for name in ("label", "macro"):
            text = f"Aperio Image Library v12.0.15\r\n{name} 256x320"
            tiff.write(shrunk(pixels, 2), description=text, **FORM)
    assert opened(path).info.level_dimensions == ((512, 640),)


def test_colours_in_pages_of_their_own_are_told(tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / "a.ome.tif"
    form = {"tile": (128, 128), "compression": "zlib", "photometric": "minisblack"}
    tifffile.imwrite(path, np.moveaxis(pixels, 2, 0), metadata={"axes": "CYX"}, **form, **MPP)
    ((what, fix),) = opened(path).info.notes
    assert what == "only the first of its 3 pages of full size is read, as grey"
    assert "interleaved RGB" in fix


def test_several_focal_planes_are_told(tmp_path: Path, pixels: np.ndarray) -> None:
    path = write(tmp_path / "a.tif", pixels, pixels, pixels, **MPP)
    ((what, _),) = opened(path).info.notes
    assert what == "only the first of its 3 pages of full size is read"


def test_more_than_eight_bits_are_told(tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / "a.tif"
    form = {"tile": (128, 128), "compression": "zlib", "photometric": "rgb"}
    tifffile.imwrite(path, pixels.astype(np.uint16) * 16, metadata=None, **form, **MPP)
    ((what, fix),) = opened(path).info.notes
    assert "16 bits per channel are cut to the upper 8" in what
    assert "convert it to 8 bits" in fix


@pytest.mark.parametrize(
    ("code", "value"),
    [(256, (FLOAT, [512.0])), (322, (LONG, [128])), (254, (SHORT, [0])), (254, None)],
)
def test_sizes_of_another_type(
    tmp_path: Path, pixels: np.ndarray, code: int, value: tuple[int, Any] | None
) -> None:
    path = set_tags(write(tmp_path / "a.tif", pixels, **MPP), {code: value})
    assert opened(path).info.level_dimensions == ((512, 640),)


@pytest.mark.parametrize(
    ("code", "value", "told"),
    [
        (256, (ASCII, b"wide\0"), "its ImageWidth is 'wide'"),
        (322, (FLOAT, [0.5]), "its TileWidth is"),
        (256, (LONG, [4_000_000_000]), "tiles in one level"),
        (258, (SHORT, [8, 16, 8]), "its BitsPerSample is"),
    ],
)
def test_values_without_a_meaning_are_named(
    tmp_path: Path, pixels: np.ndarray, code: int, value: tuple[int, Any], told: str
) -> None:
    path = set_tags(write(tmp_path / "a.tif", pixels, **MPP), {code: value})
    with pytest.raises(SlideError) as error:
        open_slide(path)
    assert told in error.value.what
