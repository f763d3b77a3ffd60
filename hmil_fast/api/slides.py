"""Find the tissue of a slide, and the tiles that `extract` would take from it."""

from pathlib import Path

from hmil_fast.extraction.prepare import thumbnail_for_tissue
from hmil_fast.io.slide import SlideReader, open_slide
from hmil_fast.io.tiles import tissue as masks
from hmil_fast.io.tiles.grid import TileGrid, TileSpec, plan_grid
from hmil_fast.io.tiles.tissue import TissueMask


def find_tissue(
    slide: SlideReader | Path | str, *, glass: tuple[int, int, int] | None = None
) -> TissueMask:
    """Find the tissue on the thumbnail of a slide, as `extract` does.

    Args:
        slide: A slide that is open, or its file.
        glass: Grey levels (red, green, blue) of the empty glass; by default they are measured.

    Returns:
        A bool mask [h, w] with its µm/px, and a note if the glass or the tissue is unusual.

    Raises:
        SlideError: The file cannot be opened, or states no plausible µm/px.

    Example:
        >>> import hmil_fast
        >>> tissue = hmil_fast.find_tissue("slides/s00.tif")
        >>> tissue.mask.dtype, tissue.mask.ndim
        (dtype('bool'), 2)
    """
    if isinstance(slide, Path | str):
        with open_slide(slide) as reader:
            return find_tissue(reader, glass=glass)
    thumbnail, um_per_px = thumbnail_for_tissue(slide)
    return masks.find_tissue(thumbnail, um_per_px, glass)


def tile_grid(
    slide: SlideReader | Path | str,
    tile_size: int = 256,
    mpp: float = 0.5,
    *,
    min_tissue: float = 0.25,
    tissue: TissueMask | None = None,
) -> TileGrid:
    """Lay the grid of tiles that `extract` would take from a slide.

    Args:
        slide: A slide that is open, or its file.
        tile_size: Side of a tile in px.
        mpp: Scale of the tiles in µm/px.
        min_tissue: Least share of tissue in a tile, 0 to 1.
        tissue: Where the tissue is; by default what `find_tissue` returns.

    Returns:
        N tiles: `coords` int64 [N, 2], the top-left corners in level-0 px, x before y; the side
        `tile_px_level0` in level-0 px; the pyramid level that is read.

    Raises:
        SlideError: The file cannot be opened, states no plausible µm/px, or is coarser than `mpp`.
        UsageError: A size, scale or share that no tile can have.

    Example:
        >>> import hmil_fast
        >>> grid = hmil_fast.tile_grid("slides/s00.tif", tile_size=128, mpp=0.5)
        >>> grid.coords.shape[1], grid.tile_px_level0
        (2, 128.0)
    """
    if isinstance(slide, Path | str):
        with open_slide(slide) as reader:
            return tile_grid(reader, tile_size, mpp, min_tissue=min_tissue, tissue=tissue)
    spec = TileSpec(tile_size, mpp, min_tissue)
    return plan_grid(slide.info, spec, find_tissue(slide) if tissue is None else tissue)
