"""Open a slide with the first reader that is known to read it right."""

import os
from dataclasses import replace
from pathlib import Path

from hmil_fast.errors import SlideError
from hmil_fast.io.slide.base import BaseReader
from hmil_fast.io.slide.cucim_reader import CucimReader, Unsuited, why_not
from hmil_fast.io.slide.openslide_reader import OpenSlideReader
from hmil_fast.io.slide.protocol import SlideInfo, SlideReader, require_mpp
from hmil_fast.io.slide.tiff_facts import TiffFacts, read_tiff


def open_slide(
    path: Path, *, mpp: float | None = None, fallback_mpp: float | None = None
) -> SlideReader:
    """Open a slide: cuCIM where it is known to be right, else OpenSlide.

    Args:
        path: The slide file.
        mpp: µm per level-0 px as the user knows it; replaces what the file states.
        fallback_mpp: The same, for a file that states none or an implausible one.

    Raises:
        SlideError: The file is missing, unreadable, cut off, or no reader opens it.
    """
    path = Path(path)
    _check_file(path)
    facts = read_tiff(path)
    reason = why_not(facts, path.suffix) or _foreign(path)
    reader: BaseReader
    if facts is not None and reason is None:
        try:
            reader = CucimReader(_info(path, facts), facts)
        except Unsuited as unsuited:
            reason = str(unsuited)
        else:
            return _with_mpp(reader, mpp, fallback_mpp)
    return _with_mpp(_second(path, facts, reason or ""), mpp, fallback_mpp)


def _foreign(path: Path) -> str | None:
    """Why a TIFF of another vendor (Philips, Ventana, Leica, …) is not for cuCIM."""
    try:
        import openslide
    except ImportError:
        return None
    vendor = openslide.OpenSlide.detect_format(path)
    return None if vendor in (None, "aperio", "generic-tiff") else f"it is a {vendor} file"


def _second(path: Path, facts: TiffFacts | None, reason: str) -> BaseReader:
    try:
        import openslide

        return OpenSlideReader(path, facts)
    except ImportError as error:
        why = f"not usable ({error})"
    except openslide.OpenSlideUnsupportedFormatError:
        why = "unknown format"
    except openslide.OpenSlideError as error:
        why = " ".join(str(error).split())
    raise SlideError(
        f"no reader opens {path.name}: cuCIM: {reason}; OpenSlide: {why}",
        "convert it to a tiled pyramidal TIFF (JPEG, RGB), or take it out of the list",
    )


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


def _info(path: Path, facts: TiffFacts) -> SlideInfo:
    return SlideInfo(
        path=path,
        reader="cucim",
        vendor=facts.vendor,
        codec=facts.codec,
        level_dimensions=tuple(level.size for level in facts.levels),
        level_tile_sizes=tuple(level.tile for level in facts.levels),
        mpp=facts.mpp,
        mpp_source=facts.mpp_source if facts.mpp is not None else f"none in {facts.mpp_source}",
        objective_power=facts.objective_power,
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
