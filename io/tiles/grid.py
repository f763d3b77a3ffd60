"""Compute which tiles of a slide are read: level, size and corners in integer level px."""

import math
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmil_fast.errors import SlideError, UsageError
from hmil_fast.io.slide import SlideInfo, require_mpp
from hmil_fast.io.tiles.augment import Augmentation
from hmil_fast.io.tiles.stain import REFERENCE_AMOUNTS, REFERENCE_STAINS, STAIN_NORMS
from hmil_fast.io.tiles.tissue import TissueMask

SAME_MPP = 0.01  # scales closer than 1 % count as equal: the spread of scanners' own calibration
MAX_TILES = 4_000_000
MAX_READ_PX = 8192
GPU_CODECS = ("jpeg", "jpeg2000")


@dataclass(frozen=True, slots=True)
class TileSpec:
    """The tiles a user asks for.

    Attributes:
        tile_px: Side of a tile in px.
        mpp: µm per px of the tile.
        min_tissue: Least share of a tile's area that must be tissue; 0 keeps every tile.
        allow_upsample: Whether a slide scanned coarser than `mpp` may be enlarged.
        coarser: µm per px of further scales, each coarser than the one before.
        views: Augmented views of every tile that are made beside the plain one.
        view_seed: Seed of what makes them differ.
        stain_norm: "none", or "macenko" to bring every slide's stains to the same.
        gpu_decoded: Codecs of the slides, of `GPU_CODECS`, whose tiles a GPU decodes.
    """

    tile_px: int = 256
    mpp: float = 0.5
    min_tissue: float = 0.25
    allow_upsample: bool = False
    coarser: tuple[float, ...] = ()
    views: int = 0
    view_seed: int = 0
    stain_norm: str = "none"
    gpu_decoded: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.tile_px <= MAX_READ_PX:
            raise UsageError(
                f"tiles of {self.tile_px} px cannot be read", f"pass --tile-size 1 to {MAX_READ_PX}"
            )
        for mpp in self.scales:
            if not 0.01 <= mpp <= 1000:
                raise UsageError(
                    f"tiles cannot be made at {mpp} µm per px", "pass --mpp between 0.01 and 1000"
                )
        for fine, coarse in pairwise(self.scales):
            if coarse < fine * (1 + 2 * SAME_MPP):
                raise UsageError(
                    f"scales of {fine:g} and {coarse:g} µm per px are too near to each other",
                    "name each --mpp once, and none within 2 % of another",
                )
        if not 0 <= self.min_tissue <= 1:
            raise UsageError(f"a tissue share of {self.min_tissue}", "pass one between 0 and 1")
        if self.stain_norm not in ("none", *STAIN_NORMS):
            raise UsageError(f"stain_norm {self.stain_norm!r}", "use none or macenko")
        if not set(self.gpu_decoded) <= set(GPU_CODECS):
            raise UsageError(
                f"gpu_decoded is {self.gpu_decoded}", f"name some of {', '.join(GPU_CODECS)}"
            )
        if self.views < 0 or self.view_seed < 0:
            raise UsageError(f"{self.views} views, seed {self.view_seed}", "pass 0 or more")

    @property
    def scales(self) -> tuple[float, ...]:
        """µm per px of all scales, the finest first."""
        return (self.mpp, *self.coarser)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the configuration's hash, without what is not asked for."""
        values = asdict(self)
        for name in ("coarser", "views", "view_seed", "stain_norm", "gpu_decoded"):
            del values[name]
        if self.gpu_decoded:
            values["gpu_decoded"] = sorted(self.gpu_decoded)
        if self.coarser:
            values["coarser"] = list(self.coarser)
        if self.views:
            how = asdict(Augmentation())
            values["views"] = {"count": self.views, "seed": self.view_seed, "augmentation": how}
        if self.stain_norm != "none":
            values["stain_norm"] = {
                "method": self.stain_norm,
                "stains": REFERENCE_STAINS.tolist(),
                "amounts": REFERENCE_AMOUNTS.tolist(),
            }
        return values


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
        parent: int32 [N], row of the tile of the next coarser scale that a tile's centre lies in;
            None for the coarsest scale.
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
    parent: NDArray[np.int32] | None = None


def plan_grid(info: SlideInfo, spec: TileSpec, tissue: TissueMask) -> TileGrid:
    """Lay a regular grid from (0, 0) over the slide and keep the tiles that hold tissue.

    The level read is the coarsest that is at least as fine as asked for; its tiles are resized
    where it is more than 1 % finer. Tiles at the right and lower edge reach past the slide.

    Raises:
        SlideError: No or an implausible mpp; the slide is coarser than asked for; too many tiles.
    """
    return plan_grids(info, replace(spec, coarser=()), tissue)[0]


def plan_grids(info: SlideInfo, spec: TileSpec, tissue: TissueMask) -> list[TileGrid]:
    """The grids of all scales, the finest first, which is as `plan_grid` lays it alone.

    Where a scale is a whole multiple of the next finer one, its tiles are made up of whole tiles
    of that one if they can be: if its mpp moves by no more than 2 %. A coarser scale also keeps
    every tile that a kept tile of the next finer one lies in, with however little tissue, so that
    each tile has its one parent.

    Raises:
        SlideError: As of `plan_grid`.
    """
    require_mpp(info)
    grids: list[TileGrid] = []
    finer: _Lattice | None = None
    for mpp in spec.scales:
        lattice = _lattice(info, replace(spec, mpp=mpp, coarser=()), finer)
        share = _tissue_share(tissue.mask, lattice.size, lattice.read_px)
        keep = share >= np.float32(spec.min_tissue)
        if finer is not None:
            place = lattice.holding(grids[-1].xy, finer)
            keep[place] = True
            rows = np.cumsum(keep, dtype=np.int32).reshape(keep.shape) - 1
            grids[-1] = replace(grids[-1], parent=rows[place])
        grids.append(_grid(info, lattice, keep, share))
        finer = lattice
    return grids


@dataclass(frozen=True, slots=True)
class _Lattice:
    """All places for tiles of a scale, with tissue or without.

    Attributes:
        spec: The tiles that are wanted.
        level: Pyramid level.
        mpp: µm per px of the level.
        size: Its width and height in px.
        read_px: Side of a tile in px of the level.
    """

    spec: TileSpec
    level: int
    mpp: float
    size: tuple[int, int]
    read_px: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return -(-self.size[1] // self.read_px), -(-self.size[0] // self.read_px)

    def holding(self, xy: NDArray[np.int64], finer: "_Lattice") -> tuple[NDArray[np.int64], ...]:
        """Row and column of the tile here that the centre of each finer tile at `xy` lies in."""
        own_size, finer_size = np.array(self.size, np.int64), np.array(finer.size, np.int64)
        place = (2 * xy + finer.read_px) * own_size // (2 * finer_size * self.read_px)
        # a tile at the edge may have its centre past the slide, and past the last tile here
        return tuple(np.minimum(place[:, 1 - k], self.shape[k] - 1) for k in (0, 1))


def _lattice(info: SlideInfo, spec: TileSpec, finer: _Lattice | None) -> _Lattice:
    level, level_mpp = _choose_level(info, spec)
    same = abs(level_mpp / spec.mpp - 1) <= SAME_MPP
    read_px = spec.tile_px if same else max(1, round(spec.tile_px * spec.mpp / level_mpp))
    size = info.level_dimensions[level]
    if finer is not None:
        read_px = _nested(read_px, size[0] / finer.size[0], spec.mpp, finer)
    if read_px > MAX_READ_PX:
        raise SlideError(
            f"{info.path.name}: a tile of {spec.tile_px} px at {spec.mpp:g} µm per px is "
            f"{read_px:,} px at {level_mpp:.4g} µm per px, its nearest level",
            "ask for a finer --mpp or a smaller --tile-size, or add pyramid levels to the slide",
        )
    lattice = _Lattice(spec, level, level_mpp, size, read_px)
    count = math.prod(lattice.shape)
    if count > MAX_TILES:
        raise SlideError(
            f"{info.path.name} makes {count:,} tiles of {read_px} px, over {MAX_TILES:,}",
            "ask for larger tiles or a coarser --mpp, or check the slide's mpp",
        )
    return lattice


def _nested(read_px: int, scale: float, mpp: float, finer: _Lattice) -> int:
    """Side of a tile that is made up of whole finer ones, where that is about the side wanted."""
    times = mpp / finer.spec.mpp
    whole = round(round(times) * finer.read_px * scale)
    near = abs(whole / read_px - 1) <= 2 * SAME_MPP and abs(times / round(times) - 1) < 1e-6
    return whole if near else read_px


def _grid(
    info: SlideInfo, lattice: _Lattice, keep: NDArray[np.bool_], share: NDArray[np.float32]
) -> TileGrid:
    xy = np.stack(np.nonzero(keep)[::-1], axis=1).astype(np.int64) * lattice.read_px
    full, at = (np.array(size, np.int64) for size in (info.level_dimensions[0], lattice.size))
    return TileGrid(
        level=lattice.level,
        read_px=lattice.read_px,
        tile_px=lattice.spec.tile_px,
        xy=xy,
        coords=(2 * xy * full + at) // (2 * at),
        tissue=share[keep],
        tile_px_level0=lattice.read_px * info.level_dimensions[0][0] / lattice.size[0],
        mpp_requested=lattice.spec.mpp,
        mpp_read=lattice.mpp,
        mpp_effective=lattice.mpp * lattice.read_px / lattice.spec.tile_px,
        slide_mpp=require_mpp(info),
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
            f"pass --mpp {scales[0]:.4g} or more, or --allow-upsample; a --store that holds slides "
            "of other settings needs a new one beside it",
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
