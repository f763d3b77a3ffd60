"""Read a TIFF's levels, codecs and tile offsets before any native code opens it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmil_fast.io.slide.protocol import Note
from hmil_fast.io.slide.tiff_mpp import Scale, likeliest, ome_scale, tag_scale, text_scale
from hmil_fast.io.slide.tiff_walk import Malformed, check_directories, damaged, is_tiff

CODECS = {
    1: "none", 5: "lzw", 6: "old-jpeg", 7: "jpeg", 8: "deflate", 32946: "deflate",
    33003: "jpeg2000", 33005: "jpeg2000", 34712: "jpeg2000", 50000: "zstd", 50001: "webp",
}  # fmt: skip
MAX_TILES = 4_000_000  # source tiles of one level; a bigger table is a damaged or hostile file
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType


@dataclass(frozen=True, slots=True)
class TiffLevel:
    """One pyramid level as the file stores it.

    `offsets` and `counts` (int64 [rows × columns], row-major) place every tile's bytes.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    compression: int
    predictor: int
    plain_rgb: bool  # 8 bits, three interleaved channels, RGB or YCbCr, tiled, as people see them
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    ycbcr: bool = False  # Photometric says YCbCr
    tables: bytes = b""  # JPEGTables, which abbreviated streams leave out

    @property
    def grid(self) -> tuple[int, int]:
        """Source tiles (across, down)."""
        return -(-self.size[0] // self.tile[0]), -(-self.size[1] // self.tile[1])


@dataclass(frozen=True, slots=True)
class TiffFacts:
    """A TIFF's levels and what it says of scale.

    Attributes:
        vendor: "aperio", "hamamatsu" or "generic-tiff".
        levels: The pyramid, finest first.
        scale: µm per px and objective power, where stated.
        directory: Number of the directory of level 0; SubIFDs do not count.
        notes: What the user should know of pages and values that are not read.
    """

    vendor: str
    levels: tuple[TiffLevel, ...]
    scale: Scale
    directory: int = 0
    notes: tuple[Note, ...] = ()

    @property
    def codec(self) -> str:
        """Codec of level 0."""
        return CODECS.get(self.levels[0].compression, "unknown")


@dataclass(frozen=True, slots=True)
class _Picture:
    """A page: `directory` is None in SubIFDs."""

    page: Any
    size: tuple[int, int]
    tiled: bool
    reduced: bool
    directory: int | None

    @property
    def area(self) -> int:
        return self.size[0] * self.size[1]


def read_tiff(path: Path) -> TiffFacts | None:
    """Look at a file's directories with pure Python.

    Returns:
        The facts, or None where the file is not a TIFF or holds no tiled image.

    Raises:
        SlideError: It is a TIFF, but damaged or cut off.
    """
    import tifffile

    if not is_tiff(path):
        return None
    check_directories(path)
    # damaged tags are reported by us, once, as an error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = list(tiff.pages)
            subs = [list(page.pages or ()) if page.subifds else [] for page in pages]
            vendor = "hamamatsu" if tiff.is_ndpi else "aperio" if tiff.is_svs else "generic-tiff"
    except tifffile.TiffFileError as error:
        raise damaged(path, f"its directories cannot be read ({_one_line(error)})") from error
    except Exception as error:  # what tifffile's parser stumbles over
        raise damaged(path, "its directories cannot be read") from error
    if not pages:
        raise damaged(path, "it holds no image")
    try:
        facts = _facts(vendor, pages, subs)
        if facts is not None:
            _check_extent(path, facts)
    except Malformed as error:
        raise damaged(path, str(error)) from None
    return facts


def _facts(vendor: str, pages: list[Any], subs: list[list[Any]]) -> TiffFacts | None:
    found = [_picture(page, n) for n, page in enumerate(pages)]
    pictures = [each for each in found if each is not None]
    if vendor == "hamamatsu":
        pictures = pictures if found[0] is not None else []
    else:
        # the slide is the largest picture: labels, macros and small levels may come first
        pictures.sort(key=lambda each: -each.area)
    if not pictures or not pictures[0].tiled:
        return None
    main, *others = pictures
    directory = main.directory or 0
    hidden = [_picture(page, None) for page in subs[directory]]
    tiled = [each for each in [*others, *hidden] if each is not None and each.tiled]
    levels, notes = _pyramid(vendor, main, tiled)
    if directory:
        notes.append((f"the slide is page {directory + 1} of {len(pages)}", ""))
    bits = _whole(main.page.bitspersample, "BitsPerSample")
    if bits > 8:
        what = (
            f"its {bits} bits per channel are cut to the upper 8: if it uses fewer, it looks dark"
        )
        notes.append((what, "convert it to 8 bits per channel, scaled to the range that it uses"))
    scale = _scale(vendor, main.page, directory)
    return TiffFacts(
        vendor, tuple(_level(each.page) for each in levels), scale, directory, tuple(notes)
    )


def _picture(page: Any, directory: int | None) -> _Picture | None:
    """A page that may be the slide or a level of it, or None."""
    wide, high, tile_wide, tile_high = (
        _whole(getattr(page, name.lower()), name)
        for name in ("ImageWidth", "ImageLength", "TileWidth", "TileLength")
    )
    kind = _whole(page.subfiletype, "NewSubfileType")
    if min(wide, high) < 1 or kind & _MASK or _is_label(page.description):
        return None
    tiled = tile_wide > 0 and tile_high > 0
    return _Picture(page, (wide, high), tiled, bool(kind & _REDUCED), directory)


def _is_label(description: str) -> bool:
    """Whether Aperio's text, whose second line says so, is that of a label or macro."""
    lines = description.splitlines()
    return (
        description.startswith("Aperio")
        and len(lines) > 1
        and lines[1].strip().startswith(("label", "macro"))
    )


def _pyramid(
    vendor: str, main: _Picture, others: Sequence[_Picture]
) -> tuple[list[_Picture], list[Note]]:
    """The levels, finest first, and what is to be said of the rest."""
    notes: list[Note] = []
    levels = {main.size: main}
    tagged = _has_resolution(main) and any(_has_resolution(e) for e in others if e.reduced)
    same = 1
    for each in sorted(others, key=lambda each: -each.area):
        marked = each.reduced or each.directory is None or vendor != "generic-tiff"
        if each.size == main.size:
            same += 1
        elif not marked and each.area > main.area // 2:
            size = f"{each.size[0]} × {each.size[1]} px"
            what = f"page {(each.directory or 0) + 1}, {size}, is another picture and is not read"
            notes.append((what, "if it is a slide, save it as a file of its own"))
        elif marked and _same_shape(main.size, each.size):
            why = None
            if vendor == "generic-tiff" and not _is_fraction(main.size, each.size):
                why = "is not the slide divided by a whole number"
            elif each.directory is not None and tagged and not _has_resolution(each):
                why = "states no resolution, as the other levels do"
            if why is None:
                levels.setdefault(each.size, each)
            else:
                size = f"{each.size[0]} × {each.size[1]} px"
                notes.append((f"a page of {size} {why}: it is not taken for a level", ""))
    if same > 1 and _whole(main.page.samplesperpixel, "SamplesPerPixel") == 1:
        what = f"only the first of its {same} pages of full size is read, as grey"
        notes.append((what, "if they are its colours, convert it to one page of interleaved RGB"))
    elif same > 1:
        notes.append((f"only the first of its {same} pages of full size is read", ""))
    return list(levels.values()), notes


def _has_resolution(picture: _Picture) -> bool:
    return tag_scale(picture.page.tags, "").mpp is not None


def _same_shape(full: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a picture has the slide's ratio of sides, to within the rounding of its size."""
    across, down = full[0] / size[0], full[1] / size[1]
    return abs(across / down - 1) <= 2 / min(size)


def _is_fraction(full: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a picture is the slide reduced by a whole number, each halving rounded anyhow."""
    times = round(full[0] / size[0])
    return times > 1 and all(abs(f - times * s) <= times for f, s in zip(full, size, strict=True))


def _level(page: Any) -> TiffLevel:
    size = _whole(page.imagewidth, "ImageWidth"), _whole(page.imagelength, "ImageLength")
    tile = _whole(page.tilewidth, "TileWidth"), _whole(page.tilelength, "TileLength")
    across, down = -(-size[0] // tile[0]), -(-size[1] // tile[1])
    if across * down > MAX_TILES or len(page.dataoffsets) > MAX_TILES:
        raise Malformed(f"it claims {across * down:,} tiles in one level")
    plain = (
        page.bitspersample == 8
        and page.samplesperpixel == 3
        and page.planarconfig == 1
        and page.sampleformat == 1
        and page.photometric in (2, 6)
        and not page.extrasamples
        and page.fillorder == 1
        and page.tags.valueof("Orientation", 1) == 1
        and len(page.dataoffsets) == len(page.databytecounts) == across * down
    )
    compression = _whole(page.compression, "Compression")
    tables = page.jpegtables if compression == 7 else None
    return TiffLevel(
        size,
        tile,
        compression,
        _whole(page.predictor, "Predictor"),
        plain,
        _places(page.dataoffsets, "TileOffsets"),
        _places(page.databytecounts, "TileByteCounts"),
        page.photometric == 6,
        tables if isinstance(tables, bytes) else b"" if tables is None else b"?",
    )


def _whole(value: Any, name: str) -> int:
    """A tag's value as a whole number, also where it was written as another type.

    Raises:
        Malformed: It is not one.
    """
    several = value if isinstance(value, tuple) else (value,)
    try:
        number = float(several[0])
        if number == int(number) and all(each == several[0] for each in several):
            return int(number)
    except (TypeError, ValueError, OverflowError, IndexError):
        pass
    raise Malformed(f"its {name} is {str(value)[:40]!r}")


def _places(values: Any, name: str) -> NDArray[np.int64]:
    try:
        return np.asarray(values, np.int64).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        raise Malformed(f"its {name} are not numbers") from None


def _scale(vendor: str, page: Any, directory: int) -> Scale:
    text = str(page.description)
    if vendor == "aperio":
        return text_scale(text, "aperio metadata")
    ome = ome_scale(text, directory) if "<OME" in text[:4096] else None
    return likeliest([ome, tag_scale(page.tags, text), text_scale(text, "ImageDescription")])


def _check_extent(path: Path, facts: TiffFacts) -> None:
    """Refuse a file whose tiles lie past its end: an unfinished copy, not a bad tile."""
    length = path.stat().st_size
    for number, level in enumerate(facts.levels):
        if (level.offsets < 0).any() or (level.counts < 0).any():
            raise Malformed(f"level {number} places tiles before the start of the file")
        if len(level.offsets) != len(level.counts):
            raise Malformed(
                f"level {number} has {len(level.offsets):,} offsets of tiles and "
                f"{len(level.counts):,} lengths"
            )
        stored = level.counts > 0  # a sparse file leaves empty tiles out
        beyond = int(np.count_nonzero(stored & (level.offsets > length - level.counts)))
        if beyond:
            raise Malformed(
                f"{beyond} of {len(level.offsets)} tiles of level {number} lie beyond its end "
                f"({length:,} bytes)"
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
