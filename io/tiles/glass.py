"""Estimate the colour of the empty glass on a thumbnail."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

UNREAD = 128  # the grey of what a reader could not decode: the job is to count it, not to skip it
BLACK = 10  # brightfield pixels darker than this in all channels are a scanner's padding
WHITE = 254  # scanners write pure white where they did not look
_CLEAR, _NEUTRAL = 190, 20  # glass as most scanners show it: bright, and of hardly any colour
_ENOUGH = 0.05  # of what was scanned, for its glass to be known by its colour alone
_LEAST = 0.01  # of the picture, else pure white counts as glass too
_BLOCK_PX = 4
_MOST_BLOCKS = 50_000
_QUIET = 3.0  # grey levels of standard deviation in a block of flat colour
_DIMMEST = 64.0
_CLOSE = 8.0
_TRIED = 20  # colours, the commonest first
_SWAPPED = 10


@dataclass(frozen=True, slots=True)
class Glass:
    """What the empty parts of a slide look like.

    Attributes:
        colour: Grey level of each channel.
        noise: Standard deviation of its pixels in grey levels, in the noisiest channel.
        usual: Whether it is as bright and colourless as most scanners show it.
    """

    colour: tuple[int, int, int]
    noise: float
    usual: bool


def find_glass(
    planes: list[NDArray[np.uint8]], clear: NDArray[np.bool_], darkest: NDArray[np.uint8]
) -> Glass | None:
    """The commonest bright, colourless colour; without one, the flat colour nothing outshines.

    Stain only takes light away, so that the second kind is the glass under a dim or coloured lamp.
    Flat pink is not taken for it: that may be tissue.

    Args:
        planes: The three channels, uint8 [h, w] each.
        clear: Pixels as bright and colourless as glass mostly is, see `is_clear`.
        darkest: uint8 [h, w], the least of the channels.

    Returns:
        None where neither is seen.
    """
    flat = _flat(planes)
    noise = flat.noise if flat else 0.0
    scanned = clear & (darkest < WHITE)
    padding = np.count_nonzero(darkest >= WHITE)
    enough = np.count_nonzero(scanned) >= _ENOUGH * max(1, darkest.size - int(padding))
    if flat and (noise > _QUIET or not enough):
        return flat
    if scanned.sum() < _LEAST * scanned.size:
        scanned = clear
    if not scanned.any():
        return None
    among = Image.fromarray(scanned.view(np.uint8))
    red, green, blue = (int(np.argmax(Image.fromarray(p).histogram(among))) for p in planes)
    return Glass((red, green, blue), noise, usual=True)


def is_clear(brightest: NDArray[np.uint8], darkest: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels [h, w] as bright and colourless as glass mostly is."""
    return (darkest > _CLEAR) & (brightest - darkest < _NEUTRAL)


def swapped_colour(planes: list[NDArray[np.uint8]]) -> tuple[str, str] | None:
    """Which colour model a slide was stored in and which it is shown in, where glass tells.

    Colourless glass has both chroma channels in the middle: shown as RGB it is red, and RGB shown
    as YCbCr is magenta. No stain is like that.
    """
    red, green, blue = planes
    middle = np.abs(green.astype(np.int16) - 128) <= _SWAPPED
    for stored, shown, seen in (
        ("YCbCr", "RGB", (red > _CLEAR) & (np.abs(blue.astype(np.int16) - 128) <= _SWAPPED)),
        ("RGB", "YCbCr", (red >= WHITE) & (blue >= WHITE)),
    ):
        if (seen & middle).mean() > _ENOUGH:
            return stored, shown
    return None


def _flat(planes: list[NDArray[np.uint8]]) -> Glass | None:
    """The commonest flat colour of the scanned parts, where it can be glass."""
    mean, spread = _blocks(planes)
    unread = (mean == UNREAD).all(axis=1) & (spread == 0)
    scanned = (mean.min(axis=1) < WHITE) & (mean.max(axis=1) >= BLACK) & ~unread
    mean, spread = mean[scanned], spread[scanned]
    if not len(mean):
        return None
    quiet = mean[spread <= max(_QUIET, 1.5 * float(np.quantile(spread, 0.1)))]
    bins, counts = np.unique((quiet / _CLOSE).astype(np.int64), axis=0, return_counts=True)
    for place in np.argsort(-counts, kind="stable")[:_TRIED]:
        near = (np.abs(mean - (bins[place] + 0.5) * _CLOSE) <= _CLOSE).all(axis=1)
        colour = np.median(mean[near], axis=0)
        if near.mean() >= _ENOUGH and _may_be_glass(colour, mean):
            usual = colour.min() > _CLEAR and np.ptp(colour) < _NEUTRAL
            red, green, blue = (round(float(level)) for level in colour)
            return Glass((red, green, blue), float(np.median(spread[near])), bool(usual))
    return None


def _may_be_glass(colour: NDArray[np.float32], mean: NDArray[np.float32]) -> bool:
    """Whether hardly anything is brighter than a colour, and it is neither dark nor pink."""
    red, green, blue = colour
    brightest = float(colour.max())
    outshone = (mean > colour + 0.05 * brightest).any(axis=1).mean() > _ENOUGH
    pink = min(red, blue) - green > _NEUTRAL * brightest / 255
    return brightest >= _DIMMEST and not (outshone or pink)


def _blocks(planes: list[NDArray[np.uint8]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean [n, 3] and standard deviation [n] of blocks, evenly over the picture."""
    high, wide = (side // _BLOCK_PX for side in planes[0].shape)
    step = 1 + int((high * wide / _MOST_BLOCKS) ** 0.5)
    means, spreads = [], []
    for plane in planes:
        cut = plane[: high * _BLOCK_PX, : wide * _BLOCK_PX]
        parts = cut.reshape(high, _BLOCK_PX, wide, _BLOCK_PX)[::step, :, ::step].astype(np.float32)
        mean = parts.mean(axis=(1, 3))
        means.append(mean.ravel())
        spreads.append(np.sqrt(np.maximum((parts**2).mean(axis=(1, 3)) - mean**2, 0)).ravel())
    return np.stack(means, axis=1), np.max(spreads, axis=0)
