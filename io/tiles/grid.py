"""Which tiles of a slide are read: level, size and corners, in integer level pixels."""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from hmil_fast.errors import SlideError, UsageError
from hmil_fast.io.slide import SlideInfo, require_mpp
from hmil_fast.io.tiles.tissue import TissueMask

SAME_MPP = 0.01  # scales closer than 1 % count as equal: the spread of scanners' own calibration
MAX_TILES = 4_000_000
MAX_READ_PX = 8192


@dataclass(frozen=True, slots=True)
class TileSpec:
    """The tiles a user asks for.

    Attributes:
        tile_px: Side of a tile in px.
        mpp: µm per px of the tile.
        min_tissue: Least share of a tile's area that must be tissue; 0 keeps every tile.
        allow_upsample: Whether a slide scanned coarser than `mpp` may be enlarged.
    """

    tile_px: int = 256
    mpp: float = 0.5
    min_tissue: float = 0.25
    allow_upsample: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.tile_px <= MAX_READ_PX:
            raise UsageError(f"a tile of {self.tile_px} px", f"pass --tile 1 to {MAX_READ_PX}")
        if not 0.01 <= self.mpp <= 1000:
            raise UsageError(f"tiles at {self.mpp} µm per px", "pass --mpp between 0.01 and 1000")
        if not 0 <= self.min_tissue <= 1:
            raise UsageError(f"a tissue share of {self.min_tissue}", "pass one between 0 and 1")

    def to_dict(self) -> dict[str, int | float | bool]:
        """Plain values, for the configuration's hash."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TileGrid:
    """The tiles of one slide, row by row from the top left.

    Attributes:
        level: Pyramid level that is read.
        read_px: Side of a tile in px of that level, before any resize.
        tile_px: Side that was asked for.
        xy: int64 [N, 2], top-left corners in px of `level`, multiples of `read_px`.
        coords: int64 [N, 2], the same in level-0 px: x · W0 / Wl, an exact ratio rounded half up.
        tissue: float32 [N], the tissue's share of the tile's whole area, padding included.
        tile_px_level0: Side of a tile in level-0 px.
        mpp_requested: µm per px that was asked for.
        mpp_read: µm per px of `level`.
        mpp_effective: µm per px after the resize to `tile_px`.
        slide_mpp: µm per level-0 px.
    """

    level: int
    read_px: int
    tile_px: int
    xy: NDArray[np.int64]
    coords: NDArray[np.int64]
    tissue: NDArray[np.float32]
    tile_px_level0: float
    mpp_requested: float
    mpp_read: float
    mpp_effective: float
    slide_mpp: float


def plan_grid(info: SlideInfo, spec: TileSpec, tissue: TissueMask) -> TileGrid:
    """Lay a regular grid from (0, 0) over the slide and keep the tiles that hold tissue.

    The level read is the coarsest that is at least as fine as asked for; its tiles are resized
    where it is more than 1 % finer. Tiles at the right and lower edge reach past the slide.

    Raises:
        SlideError: No or an implausible mpp; the slide is coarser than asked for; too many tiles.
    """
    slide_mpp = require_mpp(info)
    level, level_mpp = _choose_level(info, spec)
    same = abs(level_mpp / spec.mpp - 1) <= SAME_MPP
    read_px = spec.tile_px if same else max(1, round(spec.tile_px * spec.mpp / level_mpp))
    if read_px > MAX_READ_PX:
        raise SlideError(
            f"{info.path.name}: a tile of {spec.tile_px} px at {spec.mpp:g} µm per px is "
            f"{read_px:,} px at {level_mpp:.4g} µm per px, its nearest level",
            "ask for a finer --mpp or a smaller --tile, or add pyramid levels to the slide",
        )
    (full_w, full_h), (wide, high) = info.level_dimensions[0], info.level_dimensions[level]
    columns, rows = -(-wide // read_px), -(-high // read_px)
    if columns * rows > MAX_TILES:
        raise SlideError(
            f"{info.path.name} makes {columns * rows:,} tiles of {read_px} px, over {MAX_TILES:,}",
            "ask for larger tiles or a coarser --mpp, or check the slide's mpp",
        )
    share = _tissue_share(tissue.mask, (wide, high), read_px)
    row, column = np.nonzero(share >= np.float32(spec.min_tissue))
    xy = np.stack([column, row], axis=1).astype(np.int64) * read_px
    full, at = np.array([full_w, full_h], np.int64), np.array([wide, high], np.int64)
    return TileGrid(
        level=level,
        read_px=read_px,
        tile_px=spec.tile_px,
        xy=xy,
        coords=(2 * xy * full + at) // (2 * at),
        tissue=share[row, column],
        tile_px_level0=read_px * full_w / wide,
        mpp_requested=spec.mpp,
        mpp_read=level_mpp,
        mpp_effective=level_mpp * read_px / spec.tile_px,
        slide_mpp=slide_mpp,
    )


def _choose_level(info: SlideInfo, spec: TileSpec) -> tuple[int, float]:
    scales = [info.level_mpp(level) for level in range(len(info.level_dimensions))]
    fine_enough = [n for n, mpp in enumerate(scales) if mpp <= spec.mpp * (1 + SAME_MPP)]
    if fine_enough:
        level = max(fine_enough, key=lambda n: scales[n])
        return level, scales[level]
    if not spec.allow_upsample:
        raise SlideError(
            f"{info.path.name} is scanned at {scales[0]:.4g} µm per px, "
            f"coarser than the {spec.mpp:g} asked for",
            f"pass --mpp {scales[0]:.4g} or more, or --allow-upsample",
        )
    return 0, scales[0]


def _tissue_share(
    mask: NDArray[np.bool_], level_size: tuple[int, int], read_px: int
) -> NDArray[np.float32]:
    """float32 [rows, columns]: exact area of the mask under each tile ÷ the tile's area.

    Sums over any box come from one table of running sums, read between its points linearly, which
    is exact for a mask that is constant inside its pixels.
    """
    high, wide = mask.shape
    table = np.zeros((high + 1, wide + 1))
    np.cumsum(np.cumsum(mask, axis=0), axis=1, out=table[1:, 1:])
    across, down = (
        np.minimum(np.arange(-(-size // read_px) + 1) * read_px, size) * (side / size)
        for size, side in zip(level_size, (wide, high), strict=True)
    )
    table = _between(_between(table, down).T, across).T
    area = table[1:, 1:] - table[:-1, 1:] - table[1:, :-1] + table[:-1, :-1]
    tile_area = read_px**2 * (wide / level_size[0]) * (high / level_size[1])
    return np.asarray(np.clip(area / tile_area, 0, 1), np.float32)


def _between(table: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of a table at fractional places."""
    low = np.minimum(at.astype(np.int64), len(table) - 2)
    part = (at - low)[:, None]
    return np.asarray(table[low] * (1 - part) + table[low + 1] * part)
