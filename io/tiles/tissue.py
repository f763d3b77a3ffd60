"""Where the tissue is, seen on a thumbnail: classical, deterministic, no weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hmil_fast.io.slide import SlideInfo

if TYPE_CHECKING:
    from hmil_fast.io.tiles.grid import TileGrid

THUMBNAIL_PX = 2048  # longer side of the thumbnail to look at
CONTRAST = 12  # grey levels darker than the glass, in any channel
DARK_CONTRAST = 24  # grey levels brighter than a dark background
CLOSE_UM = 8.0  # gaps up to twice this between tissue pixels belong to the tissue
HOLE_UM2 = 20_000.0  # a smaller hole (a gland, a vessel) belongs to the tissue
SPECK_UM2 = 2_000.0  # anything smaller is dust
TISSUE_COLOUR, TILE_COLOUR = (0, 170, 60), (30, 80, 220)
_COARSER_COLOURS = ((215, 95, 0), (150, 0, 160))
LEAST_BOX_PX = 16  # smaller tiles are tinted on the overlay: their edges would hide the tissue
BLACK = 10  # brightfield pixels darker than this in all channels are a scanner's padding


@dataclass(frozen=True, slots=True)
class TissueMask:
    """Tissue on a thumbnail.

    Attributes:
        mask: bool [h, w].
        um_per_px: µm per px of the mask.
        note: What the user should know ("dark background: …", "no tissue …"), or None.
    """

    mask: NDArray[np.bool_]
    um_per_px: float
    note: str | None


def find_tissue(thumbnail: NDArray[np.uint8], um_per_px: float) -> TissueMask:
    """Find what is darker than the glass; on a dark background, what is brighter than it.

    The glass is the commonest bright, colourless colour, apart from pure white, which scanners
    write where they did not look. Ink and cover-slip edges count as tissue: no classical method
    tells them apart for certain.

    Args:
        thumbnail: uint8 [h, w, 3].
        um_per_px: µm per px of the thumbnail; sizes of gaps, holes and dust are in µm.
    """
    # one plane after the other: numpy is ten times as quick on whole planes
    planes = [np.ascontiguousarray(thumbnail[..., channel]) for channel in range(3)]
    brightest = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
    darkest = np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    glass = (darkest > 190) & (brightest - darkest < 20)
    if (brightest < 64).mean() > 0.3 and glass.mean() < 0.1:
        seen = _on_dark(brightest)
        note = "dark background: only what is brighter than it was taken as tissue"
    else:
        seen = _darker_than_glass(planes, glass, darkest) & (brightest >= BLACK)
        note = None
    mask = _clean(seen, um_per_px)
    if not mask.any():
        note = f"{note}; no tissue found" if note else "no tissue found: all glass"
    return TissueMask(mask, um_per_px, note)


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


def _darker_than_glass(
    planes: list[NDArray[np.uint8]], glass: NDArray[np.bool_], darkest: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    scanned = glass & (darkest < 254)
    if scanned.sum() < 0.01 * glass.size:
        scanned = glass
    among = Image.fromarray(scanned.view(np.uint8))
    seen = np.zeros(glass.shape, np.bool_)
    for plane in planes:
        counts = Image.fromarray(plane).histogram(among) if scanned.any() else [0] * 255 + [1]
        seen |= plane < max(int(np.argmax(counts)) - CONTRAST, 0)
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
    mask = mask | _smaller(~mask, HOLE_UM2 / um_per_px**2)
    return mask & ~_smaller(mask, SPECK_UM2 / um_per_px**2)


def _smaller(mask: NDArray[np.bool_], area_px: float) -> NDArray[np.bool_]:
    """The connected parts of a mask that are smaller than an area in px."""
    from scipy import ndimage

    label, count = ndimage.label(mask)
    small = np.bincount(label.ravel(), minlength=count + 1) < area_px
    small[0] = False
    return np.asarray(small[label], np.bool_)
