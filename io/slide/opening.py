"""Open a slide with the first reader that is known to read it right."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from hmil_fast.errors import SlideError, UsageError
from hmil_fast.io.slide.base import BaseReader
from hmil_fast.io.slide.openslide_reader import OpenSlideReader
from hmil_fast.io.slide.protocol import SlideInfo, SlideReader, require_mpp
from hmil_fast.io.slide.sources import NvImageCodecSource, RawSource, Source, Unsuited
from hmil_fast.io.slide.tiff_facts import TiffFacts, read_tiff
from hmil_fast.io.slide.tiled_reader import TiledReader

NAMES = {
    "raw": "no decoder",
    "nvimagecodec": "nvImageCodec",
    "cucim": "cuCIM",
    "libjpeg-turbo": "libjpeg-turbo",
    "openslide": "OpenSlide",
}
READERS = tuple(NAMES)
STRICT = "strict"  # JPEG by those that refuse what they have to warn of
MAX_SIDE_PX = 4_000_000  # 20 cm at 0.05 µm per px
MAX_TILE_PX = 2**26  # of one of the file's own tiles, which is decoded whole


def open_slide(
    path: Path | str,
    *,
    mpp: float | None = None,
    fallback_mpp: float | None = None,
    reader: str | None = None,
) -> SlideReader:
    """Open a slide with the first reader that is known to read it right.

    The order is fixed and nothing is timed: on a CPU nvImageCodec and cuCIM cost the same, and a
    choice by the clock would let the same slide be read differently twice. All readers give pixels
    on the CPU; what a GPU decodes (`io.slide.device_band`) comes beside them.

    Args:
        path: The slide file.
        mpp: µm per level-0 px as the user knows it; replaces what the file states.
        fallback_mpp: The same, for a file that states none or an implausible one.
        reader: One of `READERS`, to use no other; `STRICT`, to use one that refuses JPEG
            tiles of which libjpeg warns.

    Raises:
        SlideError: The file is missing, unreadable, cut off, or no reader opens it.
        UsageError: There is no such reader.

    Example:
        >>> import hmil_fast
        >>> with hmil_fast.open_slide("slides/s00.tif") as slide:
        ...     slide.info.level_dimensions[0]
        (512, 512)
    """
    path = Path(path)
    if reader is not None and reader not in (*READERS, STRICT):
        raise UsageError(f"no reader {reader!r}", f"name one of {', '.join(READERS)}")
    _check_file(path)
    facts = read_tiff(path)
    opened: BaseReader | None = None
    reasons = [] if facts is not None else ["not a tiled TIFF"]
    if facts is not None and reader != "openslide":
        opened, reasons = _tiled(path, facts, reader)
    if opened is None and reader not in (None, STRICT, "openslide"):
        raise SlideError(f"{path.name}: {'; '.join(reasons)}", "choose another reader, or none")
    if opened is None:
        opened = _second(path, facts, "; ".join(reasons) or "it was asked for")
    if facts is not None:
        reason = opened.info.reader_reason + _sparse(facts)
        opened.replace_info(replace(opened.info, reader_reason=reason))
    try:
        _check_sizes(opened.info)
    except SlideError:
        opened.close()
        raise
    return _with_mpp(opened, mpp, fallback_mpp)


def _check_sizes(info: SlideInfo) -> None:
    """Refuse sizes that only a damaged or hostile file states, before anything of it is allocated.

    Raises:
        SlideError: A side of level 0 is over `MAX_SIDE_PX`, or a tile over `MAX_TILE_PX`.
    """
    wide, high = info.level_dimensions[0]
    if max(wide, high) > MAX_SIDE_PX:
        raise SlideError(
            f"{info.path.name} claims {wide:,} × {high:,} px, more than any scanner makes "
            f"({MAX_SIDE_PX:,} a side)",
            "copy the file again, or leave it out",
        )
    for tile_wide, tile_high in info.level_tile_sizes:
        if tile_wide * tile_high > MAX_TILE_PX:
            raise SlideError(
                f"{info.path.name} has tiles of {tile_wide:,} × {tile_high:,} px, each of which "
                f"takes {tile_wide * tile_high * 4 / 1e9:,.1f} GB to read",
                "convert it to a TIFF with tiles of 256 or 512 px",
            )


def _tiled(
    path: Path, facts: TiffFacts, reader: str | None
) -> tuple[TiledReader | None, list[str]]:
    """The reader of a tiled TIFF, or why there is none."""
    foreign = _foreign(path, facts)
    if foreign is not None:
        return None, [foreign]
    refusals: dict[str, list[str]] = {}
    for name in _in_order(facts, reader):
        info = _info(path, facts, name)
        try:
            source = _source(name, info, facts)
        except Unsuited as unsuited:
            refusals.setdefault(str(unsuited), []).append(NAMES[name])
            continue
        wide, high = facts.levels[0].tile
        why = f"{NAMES[name]} reads its {facts.codec} tiles of {wide} × {high} px, each once"
        why += f" ({'; '.join(_listed(refusals))})" if refusals else ""
        return TiledReader(replace(info, reader_reason=why), facts, source), []
    return None, _listed(refusals)


def _in_order(facts: TiffFacts, reader: str | None) -> tuple[str, ...]:
    if reader in READERS:
        return (reader,)
    if facts.codec == "none":
        return ("raw",)
    if reader == STRICT and facts.codec == "jpeg":
        return ("libjpeg-turbo",)
    return "nvimagecodec", "cucim", "libjpeg-turbo"


def _listed(refusals: dict[str, list[str]]) -> list[str]:
    return [f"{' and '.join(names)}: {why}" for why, names in refusals.items()]


def _source(name: str, info: SlideInfo, facts: TiffFacts) -> Source:
    if name == "raw":
        return RawSource(facts)
    if name == "cucim":
        from hmil_fast.io.slide.cucim_source import CucimSource

        return CucimSource(info, facts)
    if name == "libjpeg-turbo":
        from hmil_fast.io.slide.libjpeg_source import LibjpegSource

        return LibjpegSource(facts)
    return NvImageCodecSource(facts)


def _sparse(facts: TiffFacts) -> str:
    counts = facts.levels[0].counts
    empty = len(counts) - int(np.count_nonzero(counts))
    return f"; {empty:,} of {len(counts):,} tiles hold no bytes: background" if empty else ""


def _foreign(path: Path, facts: TiffFacts) -> str | None:
    """Why a TIFF is OpenSlide's: another vendor's (Philips, Ventana, …), or level 0 in doubt.

    Of levels our list decides: OpenSlide does not see those in SubIFDs, and takes a macro for one.
    """
    try:
        import openslide
    except ImportError:
        return None
    vendor = openslide.OpenSlide.detect_format(path)
    if vendor is None or facts.directory:
        return None
    if vendor not in ("aperio", "generic-tiff"):
        return f"it is a {vendor} file"
    try:
        with openslide.OpenSlide(path) as slide:
            size = tuple(slide.dimensions)
    except openslide.OpenSlideError:
        return None
    ours = facts.levels[0].size
    return None if size == ours else f"OpenSlide sees {size} px on level 0, we {ours}"


def _second(path: Path, facts: TiffFacts | None, reason: str) -> BaseReader:
    fix = "convert it to a tiled pyramidal TIFF (JPEG, RGB), or take it out of the list"
    if facts is not None and facts.directory:
        why = "; ".join((*(what for what, _ in facts.notes), reason))
        raise SlideError(f"{path.name}: {why}; OpenSlide reads the first page", fix)
    try:
        import openslide

        return OpenSlideReader(path, facts, f"OpenSlide reads it ({reason})")
    except ImportError as error:
        why = f"not usable ({error})"
    except openslide.OpenSlideUnsupportedFormatError:
        why = "unknown format"
    except openslide.OpenSlideError as error:
        why = " ".join(str(error).split())
    raise SlideError(f"no reader opens {path.name}: {reason}; OpenSlide: {why}", fix)


def _with_mpp(reader: BaseReader, mpp: float | None, fallback: float | None) -> SlideReader:
    if mpp is None and fallback is not None and not _plausible(reader.info):
        mpp = fallback
    if mpp is not None:
        reader.replace_info(replace(reader.info, mpp=float(mpp), mpp_source="user"))
    return reader


def _plausible(info: SlideInfo) -> bool:
    try:
        require_mpp(info)
    except SlideError:
        return False
    return True


def _info(path: Path, facts: TiffFacts, reader: str) -> SlideInfo:
    return SlideInfo(
        path=path,
        reader=reader,
        vendor=facts.vendor,
        codec=facts.codec,
        level_dimensions=tuple(level.size for level in facts.levels),
        level_tile_sizes=tuple(level.tile for level in facts.levels),
        mpp=facts.scale.mpp,
        mpp_source=facts.scale.source,
        objective_power=facts.scale.power,
        notes=facts.notes,
    )


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise SlideError(
            f"{path.name} is a folder, not a slide",
            "name the slide file itself (of a DICOM series any one .dcm, of MIRAX the .mrxs)",
        )
    if not path.exists():
        raise SlideError(f"{path} does not exist", "check the path")
    if not path.is_file():
        raise SlideError(f"{path} is not a regular file", "name the slide file itself")
    if not os.access(path, os.R_OK):
        raise SlideError(f"{path} cannot be read: permission denied", f"run chmod +r {path.name}")
    if path.stat().st_size == 0:
        raise SlideError(f"{path.name} is empty (0 bytes)", "copy the file again")
