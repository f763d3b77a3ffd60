"""What the store keeps of a slide beside its features."""

import io
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hmil_fast.extraction.prepare import Prepared
from hmil_fast.io.tiles.grid import TileGrid

STORED_THUMBNAIL_PX = 1024


def slide_attributes(ready: Prepared, precision: str) -> dict[str, Any]:
    """Facts about a slide and how its finest tiles were read, as strict JSON."""
    info, fit = ready.reader.info, ready.stain
    stain = fit and {"od_matrix": fit.matrix.tolist(), "note": fit.note}
    return {
        "source": {"file": info.path.name, "bytes": info.path.stat().st_size},
        "reader": info.reader,
        "reader_reason": info.reader_reason,
        "codec": info.codec,
        "level0_size": list(info.level_dimensions[0]),
        **scale_attributes(ready, ready.grid),
        "coords_convention": "level0_px_topleft_xy",
        "order": "raster",
        "notes": [list(note) for note in ready.notes],
        **({"glass": list(ready.task.glass)} if ready.task.glass else {}),
        **({"stain": stain} if stain else {}),
        "precision": precision,
        "software": _software(),
    }


def scale_attributes(ready: Prepared, grid: TileGrid) -> dict[str, Any]:
    """How the tiles of one scale were read, as strict JSON."""
    return {
        "mpp": {
            "level0": grid.slide_mpp,
            "source": ready.reader.info.mpp_source,
            "requested": grid.mpp_requested,
            "read": grid.mpp_read,
            "effective": grid.mpp_effective,
        },
        "level": grid.level,
        "tile_px": grid.tile_px,
        "read_px": grid.read_px,
        "tile_px_level0": grid.tile_px_level0,
    }


@cache
def _software() -> dict[str, str]:
    return {name: version(name) for name in ("hmil-fast", "torch", "timm", "zarr")}


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """A picture for the store, its longer side at most 1,024 px."""
    buffer, picture = io.BytesIO(), Image.fromarray(pixels)
    picture.thumbnail((STORED_THUMBNAIL_PX, STORED_THUMBNAIL_PX))
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
