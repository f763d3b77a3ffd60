"""Draw attention heatmaps over the slide's thumbnail, with a scale bar and a colour key."""

import io
import math
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hmil_fast.fonts import drawn, figure_fonts
from hmil_fast.report.colour_scale import (
    KEYS,
    colour_places,
    heat_colours,
    key_ticks,
    spread,
    tile_values,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_OPACITY = 0.62
_MARGIN, _TITLE, _FOOT = 14, 46, 70  # px
_LONG_SIDE = 1000
_DPI = 100


class Node(NamedTuple):
    """One panel of a sheet: the attention map of a node of the label tree."""

    title: str
    weights: ArrayLike  # float [N], one per tile
    predicted: bool = False  # its title is set in bold


def heatmap_sheet(
    thumbnail: NDArray[np.uint8],
    coords: ArrayLike,
    tile_px_level0: float,
    nodes: Sequence[Node],
    *,
    downsample: float,
    mpp: float | None,
    title: str,
    scale: str = "share",
) -> "Image":
    """Draw the plain thumbnail and one heatmap per tree node, each with its concentration.

    Where tiles overlap, their mean is painted; a tile whose weight is not finite is not painted.

    Args:
        thumbnail: RGB, uint8 [h, w, 3].
        coords: Top-left corners of the tiles, level-0 px, int [N, 2] (x, y).
        tile_px_level0: Side of a tile in level-0 px.
        nodes: The panels, in order.
        downsample: Level-0 px per thumbnail px.
        mpp: µm per level-0 px; without it there is no scale bar.
        title: Line above the plain thumbnail, usually the slide id.
        scale: What the colours mean, one of `SCALES`.
    """
    panels = [np.asarray(thumbnail)]
    panels += [
        paint(thumbnail, coords, tile_px_level0, n.weights, downsample, scale) for n in nodes
    ]
    titles = [(title, "even attention: 10 % on any 10 % of tiles", True)]
    titles += [(n.title, spread(n.weights), n.predicted) for n in nodes]
    left, top, right, bottom = _tissue(coords, tile_px_level0 / downsample, downsample, panels[0])
    panels = [panel[top:bottom, left:right] for panel in panels]
    columns = _columns(len(panels), (bottom - top) / (right - left))
    return _draw(panels, titles, mpp * downsample if mpp else None, columns, scale)


def round_length(um: float) -> float:
    """The largest of 1, 2, 5 × 10^k µm that is not longer than `um`."""
    power = 10.0 ** math.floor(math.log10(um))
    return max(step * power for step in (1, 2, 5) if step * power <= um * (1 + 1e-9))


def _tissue(
    coords: ArrayLike, side: float, downsample: float, thumbnail: NDArray[np.uint8]
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what the tiles cover, with a margin; all where there are none."""
    height, width = thumbnail.shape[:2]
    corners = np.asarray(coords, dtype=np.float64).reshape(-1, 2) / downsample
    inside = corners[((corners > -side) & (corners < (width, height))).all(axis=1)]
    if not len(inside):
        return 0, 0, width, height
    low, high = inside.min(axis=0), inside.max(axis=0) + side
    margin = 0.06 * (high - low).max() + 1
    left, top = np.maximum(np.floor(low - margin), 0).astype(int)
    right, bottom = np.minimum(np.ceil(high + margin), (width, height)).astype(int)
    return int(left), int(top), int(right), int(bottom)


def _columns(panels: int, tallness: float) -> int:
    """Choose the columns nearest to a 16:10 page, with few places left blank."""

    def cost(columns: int) -> float:
        rows = math.ceil(panels / columns)
        return (
            abs(math.log(columns / (rows * tallness * 1.6)))
            + 2 * (rows * columns - panels) / panels
        )

    return min(range(1, panels + 1), key=cost)


def paint(
    thumbnail: NDArray[np.uint8],
    coords: ArrayLike,
    tile_px_level0: float,
    weights: ArrayLike,
    downsample: float,
    scale: str = "share",
) -> NDArray[np.uint8]:
    """Tint every tile of a finite weight on the thumbnail, see `heatmap_sheet`."""
    thumbnail = np.asarray(thumbnail, dtype=np.uint8)
    corners = np.asarray(coords, dtype=np.float64).reshape(-1, 2)
    values = tile_values(weights, scale)
    if values.shape != (len(corners),):
        raise ValueError(f"{len(corners)} tiles but weights of shape {values.shape}")
    height, width = thumbnail.shape[:2]
    known = np.isfinite(values)
    # rounding both edges, not the size, keeps neighbours touching
    start = np.rint(corners / downsample).astype(np.int64)
    stop = np.maximum(np.rint((corners + tile_px_level0) / downsample).astype(np.int64), start + 1)
    start, stop = np.clip(start, 0, (width, height)), np.clip(stop, 0, (width, height))
    total = np.zeros((height, width), dtype=np.float64)
    times = np.zeros((height, width), dtype=np.int32)
    for (x0, y0), (x1, y1), value in zip(start[known], stop[known], values[known], strict=True):
        total[y0:y1, x0:x1] += value
        times[y0:y1, x0:x1] += 1
    covered = times > 0
    places = colour_places(total[covered] / times[covered], scale)
    tint = heat_colours()[np.rint(255 * places).astype(np.int64)]
    # grey tissue below, so that the tint keeps its meaning
    grey = thumbnail[covered] @ np.array([0.299, 0.587, 0.114])
    picture = thumbnail.copy()
    picture[covered] = np.rint(_OPACITY * tint + (1 - _OPACITY) * grey[:, None]).astype(np.uint8)
    return picture


def _draw(
    panels: Sequence[NDArray[np.uint8]],
    titles: Sequence[tuple[str, str, bool]],
    um_per_px: float | None,
    columns: int,
    scale_name: str,
) -> "Image":
    """Draw panels in a grid, each with its title and scale bar, and the key below."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from PIL import Image

    rows = math.ceil(len(panels) / columns)
    height, width = panels[0].shape[:2]
    # large sheets stay readable, small thumbnails are enlarged
    scale = _LONG_SIDE / max(height, width) / max(1.0, math.sqrt(columns * rows) / 1.5)
    w, h = max(240, round(width * scale)), max(1, round(height * scale))
    page = (
        max(420, _MARGIN + columns * (w + _MARGIN)),
        _MARGIN + rows * (h + _TITLE) + (rows - 1) * _MARGIN + _FOOT,
    )
    with mpl.rc_context({"text.parse_math": False, "font.family": figure_fonts()}):
        figure = Figure(figsize=(page[0] / _DPI, page[1] / _DPI), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        left = (page[0] - columns * (w + _MARGIN) + _MARGIN) / 2
        for number, (panel, (title, below, bold)) in enumerate(zip(panels, titles, strict=True)):
            row, column = divmod(number, columns)
            x = left + column * (w + _MARGIN)
            y = page[1] - (row + 1) * (h + _TITLE) - row * _MARGIN
            axes = figure.add_axes((x / page[0], y / page[1], w / page[0], h / page[1]))
            axes.imshow(panel, interpolation="lanczos" if scale < 1 else "nearest")
            axes.set(xticks=[], yticks=[], anchor="W")
            axes.spines[:].set_color("#c8ccd2")
            figure.text(
                x / page[0],
                (y + h + 22) / page[1],
                _shortened(title, w),
                fontsize=10,
                color="#1b1f24",
                weight="bold" if bold else "normal",
            )
            figure.text(x / page[0], (y + h + 7) / page[1], below, fontsize=8, color="#59636e")
            if um_per_px:
                _scale_bar(axes, width, height, um_per_px)
        key = figure.add_axes(
            (
                (left + 12) / page[0],
                44 / page[1],
                min(420, page[0] - 2 * left - 24) / page[0],
                12 / page[1],
            )
        )
        ticks = key_ticks(scale_name)
        bar = figure.colorbar(
            ScalarMappable(cmap=ListedColormap(heat_colours() / 255)),
            cax=key,
            orientation="horizontal",
        )
        bar.set_ticks(list(ticks), labels=list(ticks.values()))
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=9, length=3, pad=2, colors="#1b1f24")
        bar.set_label(KEYS[scale_name], fontsize=9, color="#1b1f24", labelpad=2)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    file.seek(0)
    picture = Image.open(file).convert("RGB")
    picture.load()
    return picture


def _scale_bar(axes: Any, width: int, height: int, um_per_px: float) -> None:
    """A bar of a round length in the lower left corner, edged with white for dark tissue."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    um = round_length(width * um_per_px / 4)
    label = f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm"
    x, y, length, thick = (
        0.03 * width,
        height - 0.03 * width,
        um / um_per_px,
        0.008 * max(width, height),
    )
    axes.add_patch(
        Rectangle((x, y - thick), length, thick, facecolor="#111", edgecolor="white", linewidth=1)
    )
    axes.annotate(
        label,
        (x, y - thick),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=9,
        weight="bold",
        color="#111",
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def _shortened(text: str, width: int) -> str:
    """The text, cut in its middle to what a title of `width` px holds; no line breaks."""
    text, room = drawn(" ".join(text.split())), max(8, width // 8)
    if sum(map(_cells, text)) <= room:
        return text
    tail = _start(text[::-1], room - room // 2)[::-1]
    return f"{_start(text, room // 2 - 1)}…{tail}"


def _start(text: str, cells: int) -> str:
    widths = np.cumsum([_cells(letter) for letter in text])
    return text[: int(np.searchsorted(widths, cells, side="right"))]


def _cells(letter: str) -> int:
    """A Chinese letter is as wide as two Latin ones."""
    return 2 if unicodedata.east_asian_width(letter) in "FW" else 1
