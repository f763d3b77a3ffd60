"""Where the tissue is, seen on a thumbnail: classical, deterministic, no weights."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    brightest, darkest = _across(np.maximum, thumbnail), _across(np.minimum, thumbnail)
    glass = (darkest > 190) & (brightest - darkest < 20)
    if (brightest < 64).mean() > 0.3 and glass.mean() < 0.1:
        seen = _on_dark(brightest)
        note = "dark background: only what is brighter than it was taken as tissue"
    else:
        seen = (_darker_than_glass(thumbnail, glass) > CONTRAST) & (brightest >= BLACK)
        note = None
    mask = _clean(seen, um_per_px)
    if not mask.any():
        note = f"{note}; no tissue found" if note else "no tissue found: all glass"
    return TissueMask(mask, um_per_px, note)


def overlay(
    thumbnail: NDArray[np.uint8], tissue: TissueMask, grid: "TileGrid", info: SlideInfo
) -> Image.Image:
    """The thumbnail with the tissue's outline (green) and the tiles' boxes (blue)."""
    from PIL import ImageDraw
    from scipy import ndimage

    picture = thumbnail.copy()
    edge = tissue.mask & ~ndimage.binary_erosion(tissue.mask, iterations=2)
    picture[edge] = (0, 170, 60)
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    wide, high = info.level_dimensions[grid.level]
    right, down = image.width / wide, image.height / high
    for x, y in grid.xy.tolist():
        box = (x * right, y * down, (x + grid.read_px) * right - 1, (y + grid.read_px) * down - 1)
        draw.rectangle(tuple(map(round, box)), outline=(30, 80, 220))
    return image


def _darker_than_glass(thumbnail: NDArray[np.uint8], glass: NDArray[np.bool_]) -> NDArray[np.int16]:
    scanned = glass & (_across(np.minimum, thumbnail) < 254)
    if scanned.sum() < 0.01 * glass.size:
        scanned = glass
    colour = [
        np.bincount(thumbnail[scanned, channel], minlength=256).argmax() if scanned.any() else 255
        for channel in range(3)
    ]
    return _across(np.maximum, np.array(colour, np.int16) - thumbnail)


def _across(choose: np.ufunc, pixels: NDArray[Any]) -> NDArray[Any]:
    """Largest or least of three channels, ten times as quick as a reduction of so short an axis."""
    return np.asarray(choose(choose(pixels[..., 0], pixels[..., 1]), pixels[..., 2]))


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
