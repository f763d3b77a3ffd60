"""Fonts for all pictures: DejaVu Sans, and Noto Sans CJK for Chinese, Japanese and Korean."""

import unicodedata
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

_FIRST_CJK = "\u2e80"  # DejaVu has nearly all letters before it, and hardly any after


def drawn(text: str) -> str:
    """Text with each letter as one character: macOS writes names apart, as o and ¨."""
    return unicodedata.normalize("NFC", text)


def picture_font(text: str, size: int, *, bold: bool = False) -> "FreeTypeFont":
    """A font for Pillow that has the letters of a text; bold only where there is no CJK."""
    if any(letter >= _FIRST_CJK for letter in drawn(text)):
        return _open(_cjk(), size)
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return _open(_in_package("matplotlib", "mpl-data", "fonts", "ttf", name), size)


@cache
def figure_fonts() -> list[str]:
    """The font families for matplotlib, which takes each letter from the first that has it."""
    from matplotlib import font_manager

    known = font_manager.fontManager
    known.addfont(_cjk())
    regular = known.ttflist[-1]
    known.ttflist.append(replace(regular, weight=700))  # else bold text warns on every picture
    return ["DejaVu Sans", regular.name]


def _cjk() -> str:
    return _in_package("noto_cjk_sans_jp_regular", "NotoSansCJKjp-Regular.otf")


def _in_package(package: str, *parts: str) -> str:
    """A file of a package, which is not imported: matplotlib takes its time."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent.joinpath(*parts))


@cache
def _open(path: str, size: int) -> "FreeTypeFont":
    from PIL import ImageFont

    return ImageFont.truetype(path, size)
