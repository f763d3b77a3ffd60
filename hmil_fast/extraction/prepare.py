"""Open a slide, find its tissue and lay its tile grids."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hmil_fast.errors import SlideError
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.slide import Note, Progress, SlideReader, open_slide, require_mpp
from hmil_fast.io.tiles.grid import TileGrid, TileSpec, plan_grids
from hmil_fast.io.tiles.stain import StainFit, fit_macenko
from hmil_fast.io.tiles.tissue import THUMBNAIL_PX, TissueMask, find_tissue

PICTURE_PX = 1024  # longer side of a small slide's picture, about
TISSUE_UM = 4.0  # µm per px that are fine enough to find tissue: a third of what a large slide has


@dataclass(frozen=True)
class Prepared:
    """An open slide with its tissue and a grid for each scale, the finest first.

    `picture` is for people, about 700 to 2,048 px long; in `thumbnail`, of the mask's size, tissue
    was looked for. `stain` is how its stains become the reference's, where that was asked for.
    """

    task: SlideTask
    reader: SlideReader
    picture: NDArray[np.uint8]
    thumbnail: NDArray[np.uint8]
    tissue: TissueMask
    grids: list[TileGrid]
    stain: StainFit | None = None

    @property
    def grid(self) -> TileGrid:
        """The finest scale's."""
        return self.grids[0]

    @property
    def notes(self) -> tuple[Note, ...]:
        """What the user should know of it."""
        notes = list(self.reader.info.notes)
        none, found = not len(self.grid.coords), self.tissue.mask.any()
        if none and found:
            small = self.grid.read_px > min(self.reader.info.level_dimensions[self.grid.level])
            why = "the slide is smaller than a tile" if small else "none holds enough tissue"
            fix = "take a smaller --tile-size or --min-tissue, with a new --store"
            notes.append((f"0 tiles: {why}", fix))
        if self.tissue.note:
            empty = "0 tiles: " if none and not found else ""
            notes.append((f"{empty}{self.tissue.note}", self.tissue.fix))
        if self.stain and self.stain.note:
            notes.append((self.stain.note, ""))
        return tuple(notes)


def each_tenth(tell: Progress) -> Progress:
    """Passes on the first call of each tenth of the work."""
    told = -1

    def progress(share: float, px: int) -> None:
        nonlocal told
        if int(share * 10) > told:
            told = int(share * 10)
            tell(share, px)

    return progress


def prepare_slide(task: SlideTask, spec: TileSpec, progress: Progress | None = None) -> Prepared:
    """Open a slide, find its tissue and lay its grids.

    Args:
        task: The slide.
        spec: The tiles asked for.
        progress: As of `SlideReader.thumbnail`.

    Raises:
        SlideError: The slide cannot be opened, states no usable mpp, or has no level fine enough.
    """
    try:
        str(task.path).encode()
    except UnicodeEncodeError:
        raise SlideError(f"the name of {task.path} is not UTF-8", "rename the file") from None
    reader = open_slide(task.path, mpp=task.mpp, fallback_mpp=task.fallback_mpp, reader=task.reader)
    try:
        require_mpp(reader.info)
        picture, thumbnail, um_per_px = _thumbnails(reader, progress)
        tissue = find_tissue(thumbnail, um_per_px, task.glass)
        grids = plan_grids(reader.info, spec, tissue)
        stain = fit_macenko(thumbnail, tissue.mask) if spec.stain_norm == "macenko" else None
        return Prepared(task, reader, picture, thumbnail, tissue, grids, stain)
    except BaseException:
        reader.close()
        raise


def thumbnail_for_tissue(reader: SlideReader) -> tuple[NDArray[np.uint8], float]:
    """Return the thumbnail uint8 [h, w, 3] on which tissue is looked for, and its µm per px.

    Raises:
        SlideError: The slide states no plausible mpp.
    """
    require_mpp(reader.info)
    return _thumbnails(reader, None)[1:]


def _thumbnails(
    reader: SlideReader, progress: Progress | None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], float]:
    """The picture, the thumbnail and its µm per px: each pixel of these costs time on every slide.

    Only where a slide is so large that 2,048 px are coarser than `TISSUE_UM` are both the same.
    """
    sides = [max(size) for size in reader.info.level_dimensions]
    wanted = max(1, math.ceil(sides[0] * reader.info.level_mpp(0) / TISSUE_UM))
    # a whole fraction of the level that it is made of costs half of what any other size does
    side = min((side for side in sides if side >= 0.7 * PICTURE_PX), default=sides[0])
    near = min(
        (side // shrink for shrink in range(1, min(side, 64) + 1)),
        key=lambda px: abs(math.log(px / PICTURE_PX)),
    )
    picture = reader.thumbnail(min(THUMBNAIL_PX, max(near, wanted)), progress)
    high, wide = picture.shape[:2]
    scale = min(1.0, wanted / max(high, wide))
    size = max(1, round(wide * scale)), max(1, round(high * scale))
    thumbnail = picture
    if scale < 1:
        thumbnail = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))
    width = reader.info.level_dimensions[0][0]
    return picture, thumbnail, reader.info.level_mpp(0) * width / thumbnail.shape[1]
