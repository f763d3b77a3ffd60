"""Before a slide's first tile: open it, find its tissue, lay its grids."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hmil_fast.errors import SlideError
from hmil_fast.extraction.plan import SlideTask
from hmil_fast.io.slide import SlideReader, open_slide, require_mpp
from hmil_fast.io.tiles.grid import TileGrid, TileSpec, plan_grids
from hmil_fast.io.tiles.stain import StainFit, fit_macenko
from hmil_fast.io.tiles.tissue import THUMBNAIL_PX, TissueMask, find_tissue


@dataclass(frozen=True)
class Prepared:
    """An open slide with its tissue and a grid for each scale, the finest first.

    `stain` is how its stains become the reference's, where that was asked for.
    """

    task: SlideTask
    reader: SlideReader
    thumbnail: NDArray[np.uint8]
    tissue: TissueMask
    grids: list[TileGrid]
    stain: StainFit | None = None

    @property
    def grid(self) -> TileGrid:
        """The finest scale's."""
        return self.grids[0]

    @property
    def note(self) -> str | None:
        """What the user should know of it, or None."""
        notes = (self.tissue.note, self.stain and self.stain.note)
        return "; ".join(note for note in notes if note) or None


def prepare_slide(task: SlideTask, spec: TileSpec) -> Prepared:
    """Open a slide, find its tissue and lay its grids.

    Raises:
        SlideError: The slide cannot be opened, states no usable mpp, or has no level fine enough.
    """
    try:
        str(task.path).encode()
    except UnicodeEncodeError:
        raise SlideError(f"the name of {task.path} is not UTF-8", "rename the file") from None
    reader = open_slide(task.path, mpp=task.mpp, fallback_mpp=task.fallback_mpp)
    try:
        require_mpp(reader.info)
        thumbnail = reader.thumbnail(THUMBNAIL_PX)
        width = reader.info.level_dimensions[0][0]
        tissue = find_tissue(thumbnail, reader.info.level_mpp(0) * width / thumbnail.shape[1])
        grids = plan_grids(reader.info, spec, tissue)
        stain = fit_macenko(thumbnail, tissue.mask) if spec.stain_norm == "macenko" else None
        return Prepared(task, reader, thumbnail, tissue, grids, stain)
    except BaseException:
        reader.close()
        raise
