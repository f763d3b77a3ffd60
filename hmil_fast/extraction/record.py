"""What the store keeps of a slide beside its features."""

import io
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hmil_fast.extraction.prepare import Prepared

STORED_THUMBNAIL_PX = 1024


def slide_attributes(ready: Prepared, precision: str) -> dict[str, Any]:
    """Facts about a slide and how its tiles were read, as strict JSON."""
    info, grid = ready.reader.info, ready.grid
    return {
        "source": {"file": info.path.name, "bytes": info.path.stat().st_size},
        "reader": info.reader,
        "codec": info.codec,
        "level0_size": list(info.level_dimensions[0]),
        "mpp": {
            "level0": grid.slide_mpp,
            "source": info.mpp_source,
            "requested": grid.mpp_requested,
            "read": grid.mpp_read,
            "effective": grid.mpp_effective,
        },
        "level": grid.level,
        "tile_px": grid.tile_px,
        "read_px": grid.read_px,
        "tile_px_level0": grid.tile_px_level0,
        "coords_convention": "level0_px_topleft_xy",
        "order": "raster",
        "tissue_note": ready.tissue.note,
        "precision": precision,
        "software": _software(),
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
