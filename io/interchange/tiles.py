"""Coordinates and what a tile is, from a dataset `coords` as TRIDENT and CLAM write it.

TRIDENT states the tile's side in level-0 px. CLAM states it in px of a level together with the
level's downsample.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmil_fast.io.interchange import h5
from hmil_fast.io.interchange.bag import check_coords, number, refuse


@dataclass(frozen=True)
class Tiles:
    """The tiles of a slide, without their features.

    Attributes:
        coords: int64 [N, 2], level-0 px.
        tiling: What is the same for all slides of a job.
        original: The attributes as they stand in the file.
        side: Side of a tile in level-0 px, where known.
        level0_size: (width, height) of the slide in px, where known.
    """

    coords: npt.NDArray[np.int64]
    tiling: dict[str, Any]
    original: dict[str, Any]
    side: float | None
    level0_size: tuple[int | float | None, int | float | None]


def read_tiles(file: h5.H5File, rows: int) -> Tiles:
    """The dataset `coords` of an open file.

    Raises:
        SlideError: missing, damaged, or not as many as `rows`.
    """
    path = file.path
    coords = check_coords(path, h5.array(file, "coords", rows), rows)
    original = h5.attrs_of(file, "coords")
    if "patch_level" in original:
        return _clam(coords, original)
    return Tiles(
        coords,
        {
            "tile_px": number(original, "patch_size"),
            "magnification": number(original, "target_magnification"),
            "overlap_px": number(original, "overlap"),
        },
        original,
        number(original, "patch_size_level0"),
        (number(original, "level0_width"), number(original, "level0_height")),
    )


def _clam(coords: npt.NDArray[np.int64], original: dict[str, Any]) -> Tiles:
    side, level = number(original, "patch_size"), number(original, "patch_level")
    downsample, size = original.get("downsample"), original.get("level_dim")
    scale = downsample[0] if isinstance(downsample, list) and downsample else downsample
    scale = number({"scale": scale}, "scale")
    at_level0 = level == 0 and isinstance(size, list) and len(size) == 2
    return Tiles(
        coords,
        {"tile_px": side, "level": level},
        original,
        None if side is None or scale is None else side * scale,
        (size[0], size[1]) if at_level0 and size else (None, None),
    )


def companion(features: Path, folder: Path | None, rows: int) -> Tiles | None:
    """The tiles of a file of features, from TRIDENT's or CLAM's folder of coordinates.

    Args:
        features: The file of features; that of the coordinates has the same stem.
        folder: Where to look; None gives None.
        rows: Tiles that there must be.

    Raises:
        SlideError: the folder has no file for this slide, or an unfitting one.
    """
    if folder is None:
        return None
    for name in (f"{features.stem}.h5", f"{features.stem}_patches.h5"):
        if (folder / name).is_file():
            with ExitStack() as stack:
                return read_tiles(stack.enter_context(h5.open_h5(folder / name)), rows)
    raise refuse(
        folder / f"{features.stem}.h5",
        "there is no such file of coordinates",
        "Name the folder that holds <slide>.h5 or <slide>_patches.h5 with --coords.",
    )
