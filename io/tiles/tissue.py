"""Find tissue on a thumbnail: classical, deterministic, without weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hmil_fast.io.slide import SlideInfo
from hmil_fast.io.tiles.glass import BLACK, Glass, find_glass, is_clear, swapped_colour

if TYPE_CHECKING:
    from hmil_fast.io.tiles.grid import TileGrid

THUMBNAIL_PX = 2048  # longer side of the thumbnail to look at
CONTRAST = 12  # grey levels darker than the glass, in any channel; of dim glass in proportion
FULL_LIGHT = 240  # brightness of glass under a lamp that is well set
NOISE = 4.0  # grey levels of the glass's standard deviation, a third of CONTRAST
MOST_SMOOTHED_PX = 15
DARK_CONTRAST = 24  # grey levels brighter than a dark background
CLOSE_UM = 8.0  # gaps up to twice this between tissue pixels belong to the tissue
HOLE_UM2 = 20_000.0  # a smaller hole (a gland, a vessel) belongs to the tissue
SPECK_UM2 = 2_000.0  # anything smaller is dust
TISSUE_COLOUR, TILE_COLOUR = (0, 170, 60), (30, 80, 220)
_COARSER_COLOURS = ((215, 95, 0), (150, 0, 160))
LEAST_BOX_PX = 16  # smaller tiles are tinted on the overlay: their edges would hide the tissue
EVERYTHING = 0.97  # share of the picture, from which on tissue is more likely missed glass

UNEVEN = 0.25  # share of the pixels that look like glass but are darker than the glass

_FIX = (
    "look at its picture in overlays/; where it is wrong, `hmil-fast store drop` the slide, then "
    "run the same command with --glass R,G,B, the colour of its glass"
)
_FIX_COLOUR = (
    "if its picture in overlays/ has false colours, set the colour tag of a copy to {0} "
    "(`tiffset -s 262 {1} COPY`), `hmil-fast store drop` the slide and extract the copy"
)


@dataclass(frozen=True, slots=True)
class TissueMask:
    """Tissue on a thumbnail.

    Attributes:
        mask: bool [h, w].
        um_per_px: µm per px of the mask.
        note: What the user should know ("dark background: …", "no tissue …"), or None.
        fix: What to do about it; "" without a note.
    """

    mask: NDArray[np.bool_]
    um_per_px: float
    note: str | None
    fix: str = ""


def find_tissue(
    thumbnail: NDArray[np.uint8], um_per_px: float, glass: tuple[int, int, int] | None = None
) -> TissueMask:
    """Find what is darker than the glass; on a dark background, what is brighter than it.

    The colour of the glass is found by `find_glass`; a note says where it is unusual, and where
    none is found, so that everything counts as tissue. Ink and cover-slip edges count as tissue:
    no classical method tells them apart for certain.

    Args:
        thumbnail: uint8 [h, w, 3].
        um_per_px: µm per px of the thumbnail; sizes of gaps, holes and dust are in µm.
        glass: Grey levels of the glass as the user states them, in place of what is found.
    """
    # one plane after the other: numpy is ten times as quick on whole planes
    planes = [np.ascontiguousarray(thumbnail[..., channel]) for channel in range(3)]
    brightest = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
    darkest = np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    clear = is_clear(brightest, darkest)
    ground = find_glass(planes, clear, darkest) if glass is None else Glass(glass, 0.0, usual=True)
    black = (brightest < 64).mean() > 0.3 and clear.mean() < 0.1
    notes, fix = [], _FIX
    if black and (ground is None or (ground.usual and glass is None)):
        seen = _on_dark(brightest)
        notes.append("dark background: only what is brighter than it was taken as tissue")
    elif ground is None:
        seen = brightest >= BLACK
        notes.append("no glass found: everything was taken as tissue")
        swapped = swapped_colour(planes)
        if swapped:
            notes.append(
                "the glass looks coloured, as {} does that is shown as {}".format(*swapped)
            )
            fix = _FIX_COLOUR.format(swapped[0], {"RGB": 2, "YCbCr": 6}[swapped[0]])
    else:
        seen = _darker_than(ground, planes) & (brightest >= BLACK)
        if not ground.usual:
            notes.append("dim or coloured glass: tissue is what is darker than it")
        if ground.noise > NOISE:
            notes.append("noisy glass: it was smoothed first")
        elif clear.mean() > 0.05 and (clear & seen).sum() > UNEVEN * clear.sum():
            notes.append("uneven glass: its darker parts were taken as tissue")
    mask = _clean(seen, um_per_px)
    if not mask.any():
        notes.append("no tissue found" if notes else "no tissue found: all glass")
    elif not notes and glass is None and mask.mean() > EVERYTHING:
        notes.append("tissue everywhere: hardly any glass was found")
    return TissueMask(mask, um_per_px, "; ".join(notes) or None, fix if notes else "")


def tile_colour(scale: int) -> tuple[int, int, int]:
    """What `overlay` draws a scale's tiles in; the finest is 0."""
    return _COARSER_COLOURS[(scale - 1) % len(_COARSER_COLOURS)] if scale else TILE_COLOUR


def overlay(
    thumbnail: NDArray[np.uint8],
    tissue: TissueMask,
    grids: "Sequence[TileGrid]",
    info: SlideInfo,
) -> Image.Image:
    """The thumbnail with the tissue's outline (green) and the tiles (blue; coarser: orange, …).

    Tiles are boxes; where a box would be all edge, their area is outlined as one, and that of the
    finest scale tinted.

    Args:
        thumbnail: uint8 [h, w, 3] of the whole slide, at least as large as the mask.
        tissue: What `find_tissue` saw.
        grids: The tiles, the finest scale first.
        info: The slide's facts.
    """
    high, wide = thumbnail.shape[:2]
    picture = thumbnail.copy()
    mask = tissue.mask
    if mask.shape != (high, wide):
        mask = np.asarray(Image.fromarray(mask).resize((wide, high), Image.Resampling.NEAREST))
    picture[_edge(mask, 2)] = TISSUE_COLOUR
    for scale, grid in enumerate(grids):
        _draw_tiles(picture, grid, info, scale)
    return Image.fromarray(picture)


def _draw_tiles(picture: NDArray[np.uint8], grid: "TileGrid", info: SlideInfo, scale: int) -> None:
    high, wide = picture.shape[:2]
    level_wide, level_high = info.level_dimensions[grid.level]
    columns, rows = -(-level_wide // grid.read_px), -(-level_high // grid.read_px)
    kept = np.zeros((rows, columns), np.bool_)
    kept[grid.xy[:, 1] // grid.read_px, grid.xy[:, 0] // grid.read_px] = True
    column, row = (
        ((np.arange(side) + 0.5) * (full / side) / grid.read_px).astype(np.int64)
        for side, full in ((wide, level_wide), (high, level_high))
    )
    tiled = kept[row][:, column]
    if grid.read_px * wide < LEAST_BOX_PX * level_wide:
        if not scale:
            blue = np.array(TILE_COLOUR, np.uint16)
            picture[tiled] = (picture[tiled] * np.uint16(2) + blue) // 3
        drawn = _edge(tiled, 1)
    else:
        ends_x, ends_y = (
            np.diff(index, prepend=-1).astype(np.bool_) | np.diff(index, append=-1).astype(np.bool_)
            for index in (column, row)
        )
        drawn = tiled & (ends_x | ends_y[:, None])
    picture[drawn] = tile_colour(scale)


def _edge(mask: NDArray[np.bool_], px: int) -> NDArray[np.bool_]:
    """Where a mask ends within some px; beyond the picture it goes on."""
    inner = mask.copy()
    for _ in range(px):
        now = inner.copy()
        inner[1:] &= now[:-1]
        inner[:-1] &= now[1:]
        inner[:, 1:] &= now[:, :-1]
        inner[:, :-1] &= now[:, 1:]
    return mask & ~inner


def _darker_than(glass: Glass, planes: list[NDArray[np.uint8]]) -> NDArray[np.bool_]:
    from scipy import ndimage

    contrast = round(CONTRAST * min(1.0, max(glass.colour) / FULL_LIGHT))
    size = 1
    if glass.noise > NOISE:  # a mean of size² pixels has a size-th of their noise
        size = min(MOST_SMOOTHED_PX, math.ceil(4 * glass.noise / contrast) | 1)
    seen = np.zeros(planes[0].shape, np.bool_)
    for plane, level in zip(planes, glass.colour, strict=True):
        smooth = plane if size == 1 else ndimage.uniform_filter(plane, size)
        seen |= smooth < max(level - contrast, 0)
    return seen


def _on_dark(brightest: NDArray[np.uint8]) -> NDArray[np.bool_]:
    ground = brightest[brightest < 64]
    level = float(np.median(ground))
    noise = 1.4826 * float(np.median(np.abs(ground - level)))
    return brightest > level + max(DARK_CONTRAST, 6 * noise)


def _clean(seen: NDArray[np.bool_], um_per_px: float) -> NDArray[np.bool_]:
    from scipy import ndimage

    mask = seen
    radius = int(CLOSE_UM / um_per_px)
    if radius >= 1 and mask.any():  # a square: six times as quick as a disk
        size = 2 * radius + 1
        near = ndimage.maximum_filter(np.pad(mask, radius).view(np.uint8), size)
        closed = ndimage.minimum_filter(near, size).view(np.bool_)
        mask = closed[radius:-radius, radius:-radius] | seen
    if mask.any():  # else all of a small picture is a hole
        mask = mask | _smaller(~mask, HOLE_UM2 / um_per_px**2)
    return mask & ~_smaller(mask, SPECK_UM2 / um_per_px**2)


def _smaller(mask: NDArray[np.bool_], area_px: float) -> NDArray[np.bool_]:
    """The connected parts of a mask that are smaller than an area in px."""
    from scipy import ndimage

    label, count = ndimage.label(mask)
    small = np.bincount(label.ravel(), minlength=count + 1) < area_px
    small[0] = False
    return np.asarray(small[label], np.bool_)
