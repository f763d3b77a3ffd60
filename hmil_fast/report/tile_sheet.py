"""Draw the tiles of the highest attention, one row per node of the label tree."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hmil_fast.fonts import drawn, picture_font

_INK, _QUIET = "#1b1f24", "#59636e"
_MARGIN, _HEAD, _CAPTION = 14, 30, 36  # px
_TILE = (96, 256)  # smallest and largest side of a drawn tile, px


class TileRow(NamedTuple):
    """The tiles of one node, the highest attention first.

    Attributes:
        title: Name of the node and its probability.
        pixels: uint8 [k, s, s, 3].
        weights: Attention, float [k].
        corners: Top-left corners in level-0 px, int [k, 2].
    """

    title: str
    pixels: NDArray[np.uint8]
    weights: NDArray[np.float64]
    corners: NDArray[np.int64]


def tile_sheet(rows: Sequence[TileRow], width: int) -> Image.Image:
    """Draw the tiles of every node in a row, each with its share of attention and its place.

    Args:
        rows: The nodes.
        width: The picture's width in px; it is widened where the tiles would get too small.
    """
    most = max((len(row.pixels) for row in rows), default=0)
    room = (width - _MARGIN) // max(most, 1) - _MARGIN
    side = int(np.clip(room, *_TILE))
    wide = max(width, _MARGIN + most * (side + _MARGIN))
    step = _HEAD + side + _CAPTION + _MARGIN
    page = Image.new("RGB", (wide, _HEAD + len(rows) * step), "white")
    draw = ImageDraw.Draw(page)
    note = "tiles of the highest attention: share of the slide's attention, top-left corner in px"
    draw.text((_MARGIN, 6), note, _QUIET, picture_font(note, 11))
    for number, row in enumerate(rows):
        top = _HEAD + number * step
        title = drawn(" ".join(row.title.split()))
        draw.text((_MARGIN, top + 6), title, _INK, picture_font(title, 14, bold=True))
        for place, pixels in enumerate(row.pixels):
            left, y = _MARGIN + place * (side + _MARGIN), top + _HEAD
            # enlarged tiles show their pixels: nothing is interpolated
            smooth = Image.Resampling.LANCZOS if len(pixels) >= side else Image.Resampling.NEAREST
            page.paste(Image.fromarray(pixels).resize((side, side), smooth), (left, y))
            draw.rectangle((left - 1, y - 1, left + side, y + side), outline="#c8ccd2")
            share = f"{place + 1} · {100 * row.weights[place]:.3g} %"
            draw.text((left, y + side + 3), share, _INK, picture_font(share, 12))
            x0, y0 = row.corners[place]
            place_px = f"{x0:,}, {y0:,}"
            draw.text((left, y + side + 19), place_px, _QUIET, picture_font(place_px, 10))
    return page


def stacked(above: Image.Image, below: Image.Image) -> Image.Image:
    """Put one picture below another, on white."""
    size = (max(above.width, below.width), above.height + below.height)
    page = Image.new("RGB", size, "white")
    page.paste(above, (0, 0))
    page.paste(below, (0, above.height))
    return page
