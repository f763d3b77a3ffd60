"""What a TIFF says before any native code sees it: levels, codecs, where every tile's bytes lie."""

import logging
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmil_fast.errors import SlideError

CODECS = {
    1: "none", 5: "lzw", 6: "old-jpeg", 7: "jpeg", 8: "deflate", 32946: "deflate",
    33003: "jpeg2000", 33005: "jpeg2000", 34712: "jpeg2000", 50000: "zstd", 50001: "webp",
}  # fmt: skip
MAX_TILES = 16_000_000  # source tiles of one level; a bigger table is a damaged or hostile file
MICROMETRES = {2: 25_400.0, 3: 10_000.0}


@dataclass(frozen=True, slots=True)
class TiffLevel:
    """One pyramid level as the file stores it.

    `offsets` and `counts` (int64 [rows × columns], row-major) place every tile's bytes.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    compression: int
    predictor: int
    plain_rgb: bool  # 8 bits, three interleaved channels, RGB or YCbCr, tiled
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
    """A TIFF's levels and what its tags say of scale."""

    vendor: str
    levels: tuple[TiffLevel, ...]
    mpp: float | None
    mpp_source: str
    objective_power: float | None
    sub_pyramid: bool  # levels hidden in SubIFDs

    @property
    def codec(self) -> str:
        """Codec of level 0."""
        return CODECS.get(self.levels[0].compression, "unknown")


def read_tiff(path: Path) -> TiffFacts | None:
    """Look at a file's directories with pure Python.

    Returns:
        The facts, or None where the file is not a TIFF or holds no tiled image.

    Raises:
        SlideError: It is a TIFF, but damaged or cut off.
    """
    import tifffile

    # damaged tags are reported by us, once, as an error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = list(tiff.pages)
            if pages and not _is_last(tiff, pages[-1]):
                raise _damaged(path, f"only {len(pages)} of its directories are there")
            vendor = "hamamatsu" if tiff.is_ndpi else "aperio" if tiff.is_svs else "generic-tiff"
            facts = _facts(vendor, pages)
    except SlideError:
        raise
    except Exception as error:
        if _starts_like_tiff(path):
            raise _damaged(path, f"its directories cannot be read ({_one_line(error)})") from error
        return None
    if facts is not None:
        _check_extent(path, facts)
    elif not pages:
        raise _damaged(path, "it holds no image")
    return facts


def _facts(vendor: str, pages: list[Any]) -> TiffFacts | None:
    if not pages or not pages[0].is_tiled:
        return None
    first = pages[0]
    tiled = [page for page in pages if page.is_tiled and _same_shape(first, page)]
    if vendor != "aperio":
        tiled = [first] + [
            page for page in tiled[1:] if page.subfiletype & 1 or vendor != "generic-tiff"
        ]
    levels = tuple(_level(page) for page in tiled)
    mpp, source, power = _scale(vendor, first)
    return TiffFacts(vendor, levels, mpp, source, power, bool(first.subifds))


def _is_last(tiff: Any, page: Any) -> bool:
    """Whether no directory follows: tifffile stops without a word at one beyond the end."""
    file, form = tiff.filehandle, tiff.tiff
    file.seek(page.offset)
    (tags,) = struct.unpack(form.tagnoformat, file.read(form.tagnosize))
    file.seek(tags * form.tagsize, 1)
    (following,) = struct.unpack(form.offsetformat, file.read(form.offsetsize))
    return bool(following == 0)


def _same_shape(first: Any, page: Any) -> bool:
    """Whether a page is the first one made smaller, to within the rounding of its size."""
    if page.imagewidth < 1 or page.imagelength < 1:
        return False
    across, down = first.imagewidth / page.imagewidth, first.imagelength / page.imagelength
    return bool(abs(across / down - 1) <= max(1 / page.imagewidth, 1 / page.imagelength) * 2)


def _level(page: Any) -> TiffLevel:
    across, down = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
    if across * down > MAX_TILES or len(page.dataoffsets) > MAX_TILES:
        raise ValueError(f"{across * down:,} tiles in one level")
    plain = (
        page.bitspersample == 8
        and page.samplesperpixel == 3
        and page.planarconfig == 1
        and page.sampleformat == 1
        and page.photometric in (2, 6)
        and len(page.dataoffsets) == len(page.databytecounts) == across * down
    )
    return TiffLevel(
        (page.imagewidth, page.imagelength),
        (page.tilewidth, page.tilelength),
        int(page.compression),
        int(page.predictor),
        plain,
        np.asarray(page.dataoffsets, np.int64),
        np.asarray(page.databytecounts, np.int64),
        page.photometric == 6,
        bytes(page.jpegtables or b"") if page.compression == 7 else b"",
    )


def _scale(vendor: str, page: Any) -> tuple[float | None, str, float | None]:
    """(mpp, where it was read, objective power)."""
    if vendor == "aperio":
        mpp, power = (_aperio_number(page.description, key) for key in ("MPP", "AppMag"))
        return mpp, "aperio metadata", power
    tags = page.tags
    unit = MICROMETRES.get(int(tags["ResolutionUnit"].value)) if "ResolutionUnit" in tags else None
    if unit is None or "XResolution" not in tags or "YResolution" not in tags:
        return None, "no resolution tag", None
    per_unit = [_ratio(tags[name].value) for name in ("XResolution", "YResolution")]
    if min(per_unit) <= 0:
        return None, "its resolution tag is 0", None
    return (*mean_mpp(unit / per_unit[0], unit / per_unit[1], "resolution tag"), None)


def mean_mpp(x: float, y: float, source: str) -> tuple[float | None, str]:
    """One mpp from both axes, or None, saying why, where they are over 5 % apart."""
    if abs(x - y) > 0.05 * max(x, y):
        return None, f"{source}: {x:.4g} across but {y:.4g} down"
    return (x + y) / 2, source


def _aperio_number(description: str, key: str) -> float | None:
    found = re.search(rf"\b{key}\s*=\s*([0-9.]+)", description)
    try:
        value = float(found[1]) if found else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _ratio(value: tuple[int, int]) -> float:
    return value[0] / value[1] if value[1] else 0.0


def _check_extent(path: Path, facts: TiffFacts) -> None:
    """Refuse a file whose tiles lie past its end: an unfinished copy, not a bad tile."""
    length = path.stat().st_size
    for number, level in enumerate(facts.levels):
        if (level.offsets < 0).any() or (level.counts < 0).any():
            raise _damaged(path, f"level {number} places tiles before the start of the file")
        stored = level.counts > 0  # a sparse file leaves empty tiles out
        beyond = int(np.count_nonzero(stored & (level.offsets > length - level.counts)))
        if beyond:
            raise _damaged(
                path,
                f"{beyond} of {len(level.offsets)} tiles of level {number} lie beyond its end "
                f"({length:,} bytes)",
            )


def _starts_like_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _damaged(path: Path, why: str) -> SlideError:
    return SlideError(f"{path.name} is damaged or cut off: {why}", "copy the file again")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
