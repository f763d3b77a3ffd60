"""CLAM: `features` float32 and `coords` without attributes; what a tile is stands in `patches/`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from hmil_fast.io.interchange import h5, outgoing, pt
from hmil_fast.io.interchange.bag import Bag, Hints, check_coords, facts, refuse
from hmil_fast.io.interchange.outgoing import Outgoing, Part, as_float32
from hmil_fast.io.interchange.tiles import companion

FOLDER = "h5_files"


@contextmanager
def read(path: Path, slide_id: str, hints: Hints) -> Iterator[Bag]:
    """Open one slide's features, and its file in `patches/` for the size of the tiles."""
    folder = hints.coords
    if folder is None and path.parent.name == FOLDER:
        beside = path.parent.parent / "patches"
        folder = beside if beside.is_dir() else None
    with h5.open_h5(path) as file:
        rows = h5.shape(file, "features")[0]
        coords = check_coords(path, h5.array(file, "coords", rows), rows)
        tiles = companion(path, folder, rows)
        if tiles is not None and not np.array_equal(tiles.coords, coords):
            raise refuse(
                path,
                f"its coordinates are not those of {folder}",
                "Name the folder `patches` that these features were extracted from.",
            )
        yield h5.features(
            file,
            "features",
            hints,
            coords=coords,
            encoder=hints.encoder,
            tiling={"tile_px": None, "level": None} if tiles is None else tiles.tiling,
            attrs=facts(
                "clam",
                {"features": h5.attrs_of(file, "features")}
                | ({} if tiles is None else {"coords": tiles.original}),
                tile_px_level0=None if tiles is None else tiles.side,
                level0_size=(None, None) if tiles is None else tiles.level0_size,
                mpp=hints.mpp_of(slide_id),
            ),
            notes=()
            if tiles is not None
            else ("the size of its tiles is not known: name CLAM's `patches` with --coords",),
        )


def parts(folder: Path, slide: Outgoing) -> list[Part]:
    """The three files to write: tiles, the tensor that CLAM trains on, features."""
    coords = slide.needed_coords("clam")
    single = as_float32(slide)
    files = []
    about = slide.original("clam").get("coords") or _about(slide)
    if about is not None:
        path = folder / "patches" / f"{slide.name}.h5"

        def same(found: Path, hints: Hints) -> bool:
            tiles = companion(found, found.parent, len(coords))
            return tiles is not None and np.array_equal(tiles.coords, coords)

        files.append(
            Part(
                path,
                lambda to: h5.write_h5(to, {"coords": coords}, {"coords": about}),
                same,
            )
        )
    files.append(pt.part(folder / "pt_files" / f"{slide.name}.pt", single))
    arrays: h5.Arrays = {"features": single.bag, "coords": coords.astype(np.int32)}
    path = folder / FOLDER / f"{slide.name}.h5"
    files.append(outgoing.h5_part(path, partial(_features_only, slide.slide_id), arrays, {}))
    return files


@contextmanager
def _features_only(slide_id: str, path: Path, hints: Hints) -> Iterator[Bag]:
    with h5.open_h5(path) as file:
        rows = h5.shape(file, "features")[0]
        coords = check_coords(path, h5.array(file, "coords", rows), rows)
        yield h5.features(file, "features", hints, coords=coords)


def _about(slide: Outgoing) -> Mapping[str, object] | None:
    if slide.tile_px_level0 is None:
        return None
    level = slide.attrs.get("level", 0)
    side = slide.attrs.get("read_px") if level else None
    # of tiles that were read from a level we know; else as if they had been read from level 0
    level, side = (level, side) if side else (0, slide.tile_px_level0)
    scale = slide.tile_px_level0 / side
    width, height = slide.level0_size or (0, 0)
    size = (round(width / scale), round(height / scale))
    return {
        "patch_size": round(side),
        "patch_level": level,
        "downsample": (scale, scale),
        "downsampled_level_dim": size,
        "level_dim": size,
        "name": slide.name,
        "save_path": "",
    }
