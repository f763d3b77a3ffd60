"""Map attention to colour, for heatmaps and the report's viewer alike."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

SCALES = ("share", "rank")
"""Attention as times the even share, or by rank within the slide."""
LIMIT = 8.0
"""The colours of shares end at so many times the even share, and at its inverse."""
KEYS = {
    "share": "attention of a tile, times the even share",
    "rank": "attention, by rank within the slide (0 lowest, 1 highest)",
}
_COLOURS = "viridis"  # even in lightness and safe for the colour-blind; pink tissue has none of it


def tile_values(weights: ArrayLike, scale: str) -> Floats:
    """Scale attention to multiples of the even share 1/N, or to ranks; overlaps average these.

    Args:
        weights: Attention, float [N]; NaN for a tile that is in no bag.
        scale: One of `SCALES`.

    Returns:
        float64 [N]; 1 is the even share. Ranks lie in 0..1, ties share their mean. NaN stays NaN.
    """
    values = np.asarray(weights, dtype=np.float64)
    known = np.isfinite(values)
    scaled = np.full(values.shape, np.nan)
    if scale == "rank":
        scaled[known] = _ranks(values[known])
    elif known.any():
        mean = values[known].mean()
        scaled[known] = values[known] / mean if mean > 0 else 1.0
    return scaled


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(values) < 2:
        return np.full(len(values), 0.5)
    mean_rank = np.cumsum(counts) - (counts + 1) / 2
    return np.asarray(mean_rank[inverse] / (len(values) - 1))


def colour_places(values: ArrayLike, scale: str) -> Floats:
    """Places 0..1 among the colours; shares by their logarithm, with the even share at 0.5."""
    values = np.asarray(values, dtype=np.float64)
    if scale == "rank":
        return values
    with np.errstate(divide="ignore"):
        places = 0.5 + np.log(values) / (2 * np.log(LIMIT))
    return np.asarray(np.clip(places, 0.0, 1.0))


def key_ticks(scale: str) -> dict[float, str]:
    """Labels of the key by their place among the colours."""
    if scale == "rank":
        return {0.0: "0", 0.5: "0.5", 1.0: "1"}
    times = {1 / LIMIT: f"≤ 1/{LIMIT:g}", 0.25: "1/4", 0.5: "1/2", 1: "1", 2: "2", 4: "4"}
    times[LIMIT] = f"≥ {LIMIT:g}"
    return {float(colour_places(v, scale)): text for v, text in times.items()}


def concentration(weights: ArrayLike) -> float:
    """Share of the attention that the 10 % of tiles with the highest hold; 0.1 where it is even."""
    values = np.asarray(weights, dtype=np.float64)
    values = np.sort(values[np.isfinite(values)])[::-1]
    if not len(values) or values.sum() <= 0:
        return 0.1
    held = np.concatenate([[0.0], np.cumsum(values)]) / values.sum()
    return float(np.interp(len(values) / 10, np.arange(len(held)), held))


def spread(weights: ArrayLike) -> str:
    """Say how concentrated attention is, in words."""
    return f"top 10 % of tiles: {100 * concentration(weights):.3g} % of attention"


def heat_colours() -> NDArray[np.uint8]:
    """The colours of the places 0 to 1, RGB, uint8 [256, 3]."""
    import matplotlib as mpl

    colours = np.asarray(mpl.colormaps[_COLOURS](np.arange(256)), dtype=np.float64)
    return np.asarray(np.rint(colours[:, :3] * 255), dtype=np.uint8)
