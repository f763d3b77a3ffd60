"""Read µm per px and objective power of a TIFF: Aperio's text, OME-XML, resolution tags."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

from hmil_fast.io.slide.protocol import PLAUSIBLE_MPP

_UNITS_UM: dict[float, float] = {
    2: 25_400.0,
    3: 10_000.0,
    4: 1_000.0,
    5: 1.0,
}  # ResolutionUnit; 4, 5: DNG's
_INCH = 2  # what TIFF takes where no unit is stated
_LENGTHS_UM = {
    "pm": 1e-6, "å": 1e-4, "nm": 1e-3, "um": 1.0, "micron": 1.0, "microns": 1.0, "mm": 1e3,
    "cm": 1e4, "dm": 1e5, "m": 1e6, "in": 25_400.0, "inch": 25_400.0,
}  # fmt: skip
_RATIONALS = (5, 10)  # tag types that hold pairs
_NUMBER = re.compile(
    r"([+-]?(?:\d+[.,]?\d*|[.,]\d+)(?:e[+-]?\d+)?)\s*(?:x|[uµμ]m(?:/px)?)?", re.IGNORECASE
)
_SAME_AXES = 0.05
MAX_XML = 64 * 2**20  # characters


class Scale(NamedTuple):
    """What a file states of its scale.

    Attributes:
        mpp: µm per level-0 px, plausible or not; None where there is no number.
        source: Where it was read; where `mpp` is None, what was found instead.
        power: Objective power, or None.
    """

    mpp: float | None
    source: str
    power: float | None = None


def likeliest(scales: Sequence[Scale | None]) -> Scale:
    """The first plausible one, else the first with a number, else the first that says why not."""
    found = [scale for scale in scales if scale is not None]
    low, high = PLAUSIBLE_MPP
    plausible = (s for s in found if s.mpp is not None and low <= s.mpp <= high)
    best = next(plausible, None) or next((s for s in found if s.mpp is not None), found[0])
    return best._replace(power=next((s.power for s in found if s.power is not None), None))


def number(text: str | None) -> float | None:
    """A number as metadata write it: a comma for the point, an exponent, a unit µm or x behind it.

    None where the text is anything else, nan and infinity too.
    """
    found = _NUMBER.fullmatch((text or "").strip())
    value = float(found[1].replace(",", ".")) if found else math.nan
    return value if math.isfinite(value) else None


def mean_mpp(x: float, y: float, source: str) -> tuple[float | None, str]:
    """One mpp from both axes, or None, saying why, where they are over 5 % apart."""
    if abs(x - y) > _SAME_AXES * max(abs(x), abs(y)):
        return None, f"{source}: {x:.4g} across but {y:.4g} down"
    return (x + y) / 2, source


def text_scale(description: str, source: str) -> Scale:
    """`MPP` and `AppMag` of a description whose fields a bar separates, as Aperio writes it."""
    power = next((number(text) for text in _fields(description, "AppMag")), None)
    stated = list(dict.fromkeys(_fields(description, "MPP")))
    if not stated:
        return Scale(None, f"none in {source}", power)
    values = {number(text) for text in stated}
    if len(values) > 1 or None in values:
        text = " and ".join(f"MPP = {each[:40]!r}" for each in stated)
        return Scale(None, f"{text} in {source}", power)
    return Scale(values.pop(), source, power)


def _fields(description: str, key: str) -> list[str]:
    """Values of a key, however often it stands there."""
    pairs = (field.partition("=") for field in re.split(r"[|\r\n;]", description))
    return [value.strip() for name, _, value in pairs if name.strip().casefold() == key.casefold()]


def ome_scale(xml: str, directory: int) -> Scale | None:
    """Physical size of the image in a directory by an OME-XML text; None where it is not such.

    A missing unit is µm. Entities are refused: a short text could grow without end.
    """
    if len(xml) > MAX_XML or "<!DOCTYPE" in xml:
        return None
    try:
        root = ET.fromstring(xml.strip("\0 \r\n\t").encode())  # noqa: S314  # no entities
    except (ET.ParseError, ValueError):
        return None
    power = next(
        (number(each.get("NominalMagnification")) for each in root.iterfind(".//{*}Objective")),
        None,
    )
    pixels = _pixels(root, directory)
    if pixels is None:
        return None
    sizes: list[float] = []
    for axis in ("X", "Y"):
        text, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        um = _LENGTHS_UM.get(_plain(unit))
        value = number(text)
        if text is not None and (um is None or value is None):
            return Scale(None, f"PhysicalSize{axis} = {text[:40]!r} {unit[:20]} in OME-XML", power)
        if um is not None and value is not None:
            sizes.append(value * um)
    if not sizes:
        return Scale(None, "none in OME-XML", power)
    return Scale(*mean_mpp(sizes[0], sizes[-1], "OME-XML"), power)


def _pixels(root: ET.Element, directory: int) -> ET.Element | None:
    """The image that says it lies in a directory, or else the first."""
    every = root.findall("{*}Image/{*}Pixels")
    for pixels in every:
        if str(directory) in {at.get("IFD", "0") for at in pixels.iterfind("{*}TiffData")}:
            return pixels
    return next(iter(every), None)


def tag_scale(tags: Any, description: str) -> Scale:
    """Resolution tags of any type, in inches where no unit is stated.

    Args:
        tags: tifffile's tags of the page of level 0.
        description: Its ImageDescription, where ImageJ names a unit.
    """
    found = [tags.get(name) for name in ("XResolution", "YResolution")]
    if all(tag is None for tag in found):
        return Scale(None, "no resolution tag")
    values = [_of_tag(tag) for tag in found if tag is not None]
    numbers = [value for value in values if value is not None]
    shown = " and ".join("nothing usable" if v is None else f"{v:g}" for v in values)
    if len(numbers) < len(values) or min(numbers) <= 0:
        return Scale(None, f"its resolution tags say {shown}")
    um, source = _unit(tags.get("ResolutionUnit"), description)
    if um is None:
        return Scale(None, f"its resolution tags say {shown}, without a unit")
    return Scale(*mean_mpp(um / numbers[0], um / numbers[-1], source))


def _unit(tag: Any, description: str) -> tuple[float | None, str]:
    """µm of the unit that resolution tags count in, or None, and the source to name."""
    if description.startswith("ImageJ="):
        for text in _fields(description, "unit"):
            if um := _LENGTHS_UM.get(_plain(text)):
                return um, "resolution tag in ImageJ's unit"
    if tag is None:
        return _UNITS_UM[_INCH], "resolution tag in inches, TIFF's default"
    unit = _of_tag(tag)
    return None if unit is None else _UNITS_UM.get(unit), "resolution tag"


def _plain(unit: str) -> str:
    """A unit's name in lower case, with u for µ, as ImageJ escapes it too."""
    return re.sub(r"\\u00b5|[µμ]", "u", unit.strip().casefold())


def _of_tag(tag: Any) -> float | None:
    """A tag's first number, of whatever type it is; None where it has none."""
    value = tag.value
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if isinstance(value, str):
        return number(value.strip("\0 "))
    several: Sequence[Any] = value if isinstance(value, (tuple, list)) else [value]
    try:
        parts = [float(each) for each in several]
    except (TypeError, ValueError):
        return None
    if int(tag.dtype) in _RATIONALS:
        if len(parts) < 2 or not parts[1]:
            return None
        parts = [parts[0] / parts[1]]
    return parts[0] if parts and math.isfinite(parts[0]) else None
