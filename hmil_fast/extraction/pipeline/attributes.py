"""Collect the facts about a slide that the store keeps beside its features."""

import hashlib
import io
import os
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hmil_fast import __version__
from hmil_fast.device import driver_version
from hmil_fast.extraction.prepare import Prepared
from hmil_fast.io.tiles.grid import TileGrid

STORED_THUMBNAIL_PX = 1024
# each may change a pixel or a feature; of several names the one that is installed
_PACKAGES = {
    "torch": ("torch",),
    "timm": ("timm",),
    "zarr": ("zarr",),
    "nvimgcodec": ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"),
    "dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
}
_ENDS_BYTES = 2**16


def slide_attributes(ready: Prepared, precision: str, device: torch.device) -> dict[str, Any]:
    """Facts about a slide and how its finest tiles were read, as strict JSON.

    Args:
        ready: The slide.
        precision: What the encoder computes in.
        device: Where it does.
    """
    info, fit = ready.reader.info, ready.stain
    stain = fit and {"od_matrix": fit.matrix.tolist(), "note": fit.note}
    return {
        "source": source(info.path),
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
        "software": software(device),
    }


def source(path: Path) -> dict[str, Any]:
    """By what a slide's file is known again: its name, size, and a digest of its head and tail."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(b"%d" % size)
        for start in (0, max(0, size - _ENDS_BYTES)):
            file.seek(start)
            digest.update(file.read(_ENDS_BYTES))
    return {"file": path.name, "bytes": size, "digest": f"sha256:{digest.hexdigest()}"}


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
def software(device: torch.device) -> dict[str, str]:
    """Versions of what makes pixels and features, and the GPU and its driver, as far as there.

    Needs no installed hmil-fast: its version is the code's own.
    """
    found = {"hmil-fast": __version__}
    for name, packages in _PACKAGES.items():
        for package in packages:
            with suppress(PackageNotFoundError):
                found.setdefault(name, version(package))
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda or "unknown"
        found["driver"] = driver_version()
    return found


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """A picture for the store, its longer side at most 1,024 px."""
    buffer, picture = io.BytesIO(), Image.fromarray(pixels)
    picture.thumbnail((STORED_THUMBNAIL_PX, STORED_THUMBNAIL_PX))
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
