"""Draw the slide picture for heatmaps and the viewer, and read single tiles from the slide file."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hmil_fast.errors import SlideError, StoreError
from hmil_fast.io.store import FeatureStore, SlideRecord

if TYPE_CHECKING:
    from hmil_fast.io.slide.protocol import SlideReader

_PX = 1536  # longest side of a picture that is made here
_TILE_PX = 256  # read size where the store states none
_TILE_GREY = 222


@dataclass(frozen=True)
class Canvas:
    """A picture of a slide, and where its tiles lie on it.

    Attributes:
        picture: RGB, uint8 [h, w, 3].
        real: Whether it shows the slide; else it is white, with the tiles in light grey.
        coords: Top-left corners of the tiles, level-0 px, int64 [N, 2] (x, y).
        side: Side of a tile in level-0 px.
        size: (width, height) of the slide in level-0 px.
        mpp: µm per level-0 px, where known.
        notes: What was guessed, for people.
    """

    picture: NDArray[np.uint8]
    real: bool
    coords: NDArray[np.int64]
    side: float
    size: tuple[int, int]
    mpp: float | None
    notes: tuple[str, ...]

    @property
    def downsample(self) -> float:
        """Level-0 px per px of the picture."""
        return float(self.size[0] / self.picture.shape[1])


def why_not_drawn(record: SlideRecord) -> str | None:
    """Return what a slide lacks to be drawn, or None."""
    if not record.num_tiles:
        return "no tissue tiles"
    if record.attrs.get("coords_convention", "") is None:
        return "no coordinates"
    return None


def draw_on(store: FeatureStore, slide_id: str, slide: Path | None = None) -> Canvas:
    """Return the picture of a stored slide, with its tiles.

    Args:
        store: Holds the slide; imported ones may lack thumbnail, sizes and µm per px.
        slide_id: The slide.
        slide: Its file, for what the store lacks.

    Raises:
        StoreError: The slide is not in the store, or has no tiles or no coordinates.
        SlideError: The file is of another slide, or cannot be opened.
    """
    record = store.record(slide_id)
    why = why_not_drawn(record)
    if why is not None:
        raise StoreError(
            f"slide {slide_id!r} has {why} in {store.path}",
            "look at its overlay" if not record.num_tiles else "import it with --coords FOLDER",
        )
    attrs, coords = record.attrs, store.coords(slide_id).astype(np.int64)
    notes = []
    side = attrs.get("tile_px_level0")
    if side is None:
        side = _spacing(coords)
        notes.append("the store does not state the size of tiles, so their distance is drawn")
    size, mpp = attrs.get("level0_size"), attrs.get("mpp", {}).get("level0")
    jpeg = store.file(slide_id, "thumbnail.jpg")
    picture = None if jpeg is None else np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    if slide is not None and (picture is None or size is None or mpp is None):
        from hmil_fast.io.slide import open_slide

        with open_slide(slide) as reader:
            _check(reader, slide, record, coords)
            size, mpp = reader.info.level_dimensions[0], mpp or reader.info.mpp
            picture = reader.thumbnail(_PX) if picture is None else picture
    real = picture is not None
    if size is None:
        size = np.maximum((coords + side).max(axis=0), 1).astype(int).tolist()
    if picture is None:
        picture = _blank(coords, side, (size[0], size[1]))
        notes.append("drawn on a blank sheet, the store has no thumbnail: --slides names the files")
    return Canvas(
        picture, real, coords, float(side), (int(size[0]), int(size[1])), mpp, tuple(notes)
    )


def cut_tiles(
    slide: Path, record: SlideRecord, canvas: Canvas, tiles: NDArray[np.integer] | list[int]
) -> NDArray[np.uint8]:
    """Read tiles of a stored slide from its file, at the resolution they were encoded at.

    Where an import does not state it, the level nearest to 256 px a tile is read.

    Args:
        slide: The slide's file.
        record: The slide in the store.
        canvas: Where its tiles lie.
        tiles: Rows of the tiles, [n].

    Returns:
        uint8 [n, read_px, read_px, 3]; what cannot be read is white.

    Raises:
        SlideError: The file is not the one that was extracted, or cannot be opened.
    """
    from hmil_fast.io.slide import open_slide

    corners = canvas.coords[tiles]
    with open_slide(slide) as reader:
        _check(reader, slide, record, canvas.coords)
        dimensions = np.array(reader.info.level_dimensions)
        level, size = record.attrs.get("level"), record.attrs.get("read_px")
        if level is None or size is None:
            sides = canvas.side * dimensions[:, 0] / dimensions[0, 0]
            level = int(np.abs(np.log(sides / _TILE_PX)).argmin())
            size = min(max(1, round(sides[level])), 4 * _TILE_PX)
        scale = dimensions[int(level)] / dimensions[0]
        out = np.empty((len(corners), int(size), int(size), 3), dtype=np.uint8)
        reader.read(int(level), np.rint(corners * scale).astype(np.int64), int(size), out)
    return out


def _check(
    reader: "SlideReader", slide: Path, record: SlideRecord, coords: NDArray[np.int64]
) -> None:
    """Refuse a file of another size, or one that the tiles lie outside of."""
    levels, stated = reader.info.level_dimensions, record.attrs.get("level0_size")
    width, height = levels[0]
    if stated is not None and list(levels[0]) != [round(n) for n in stated]:
        other = f"has {stated[0]} × {stated[1]} px"
    elif record.attrs.get("level", 0) >= len(levels):
        other = f"was read from level {record.attrs['level']}"
    elif (coords >= (width, height)).any():
        other = "has tiles at up to {}, {}".format(*coords.max(axis=0).tolist())
    else:
        return
    raise SlideError(
        f"{slide} is {width} × {height} px on {len(levels)} levels, but the slide "
        f"{record.slide_id!r} in the store {other}",
        "name the file that was extracted",
    )


def _spacing(coords: NDArray[np.int64]) -> float:
    """Return the commonest distance of neighbours in a row or column, in level-0 px."""
    steps = []
    for along in (0, 1):
        across = coords[:, 1 - along]
        order = np.lexsort((coords[:, along], across))
        step = np.diff(coords[order, along])
        steps.append(step[(np.diff(across[order]) == 0) & (step > 0)])
    values, counts = np.unique(np.concatenate(steps), return_counts=True)
    return float(values[counts.argmax()]) if len(values) else float(_TILE_PX)


def _blank(coords: NDArray[np.int64], side: float, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw the tiles in light grey on white."""
    scale = min(1.0, _PX / max(size))
    picture = np.full(
        (max(1, round(size[1] * scale)), max(1, round(size[0] * scale)), 3), 255, np.uint8
    )
    start = np.rint(np.maximum(coords, 0) * scale).astype(int)
    stop = np.maximum(np.rint((coords + side) * scale).astype(int), start + 1)
    for (x0, y0), (x1, y1) in zip(start, stop, strict=True):
        picture[y0:y1, x0:x1] = _TILE_GREY
    return picture
