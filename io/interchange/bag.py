"""Read-only features of one slide from any format, and their conversion to a store's dtype."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import SlideError
from hmil_fast.io.store.layout import MAX_DIM, MAX_TILES, STORED_AS

ROWS_AT_ONCE = 4096
COORDS = "level0_px_topleft_xy"


@dataclass(frozen=True)
class Hints:
    """What the person who imports knows and the files may not say.

    Attributes:
        coords: Folder of the coordinate files, where features and coordinates lie apart.
        encoder: Name of the encoder; in files of several, the one to take.
        mpp: Level-0 µm/px by slide id, "" for all others.
        dtype: "float16" or "float32" to convert to; None keeps the file's.
    """

    coords: Path | None = None
    encoder: str | None = None
    mpp: Mapping[str, float] = field(default_factory=dict)
    dtype: str | None = None

    def mpp_of(self, slide_id: str) -> float | None:
        """Level-0 µm/px of a slide, if stated."""
        return self.mpp.get(slide_id, self.mpp.get(""))


@dataclass(frozen=True)
class Bag:
    """One slide's tiles in a feature file that is open.

    Attributes:
        shape: (N, D); (0, 0) is a slide without tiles whose feature length nobody stated.
        dtype: "float16", "float32", or "bfloat16" as bits in uint16.
        read: Rows from `start` to before `stop`, [n, D] in the stored dtype.
        coords: int64 [N, 2], top-left corners (x, y) in level-0 px; None where there are none.
        encoder: Name of the encoder, where stated.
        tiling: Which pixels a tile stands for, the same for all slides of a job.
        attrs: Facts about the slide, and under "imported" the file's own attributes, verbatim.
        notes: What the person should know.
    """

    shape: tuple[int, int]
    dtype: str
    read: Callable[[int, int], npt.NDArray[Any]]
    coords: npt.NDArray[np.int64] | None
    encoder: str | None = None
    tiling: dict[str, Any] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """All rows, a block at a time."""
        for start in range(0, self.shape[0], ROWS_AT_ONCE):
            yield self.read(start, min(start + ROWS_AT_ONCE, self.shape[0]))


def refuse(path: Path, why: str, fix: str = "Write the file anew, or leave it out.") -> SlideError:
    """The error for one file that cannot be taken."""
    return SlideError(f"{path}: {why}", fix)


def as_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (N, D) of features that were saved as a batch of one slide, or as pooled maps.

    (1, N, D), (N, 1, D) and (N, D, 1, 1) hold the same values in the same order. Other shapes come
    back as they are.
    """
    if len(shape) == 4 and shape[2:] == (1, 1):
        return shape[:2]
    if len(shape) == 3 and 1 in shape[:2]:
        return shape[1:] if shape[0] == 1 else (shape[0], shape[2])
    return shape


def check_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape (N, D) of tile features; (0,) is a slide without tiles.

    Raises:
        SlideError: one vector for the whole slide, a third axis, or sizes out of bounds.
    """
    shape = as_rows(shape)
    if shape == (0,):
        return (0, 0)
    if len(shape) != 2 or not 0 <= shape[0] <= MAX_TILES or not 1 <= shape[1] <= MAX_DIM:
        raise refuse(
            path,
            f"features are of shape {shape}, not (tiles, values)",
            "Give files of tile features, not of slide embeddings or pictures.",
        )
    return (shape[0], shape[1])


def target_dtype(path: Path, dtype: np.dtype[Any], hints: Hints) -> str:
    """The dtype that features are stored in: the file's own, float64 as float32, or the one asked.

    Raises:
        SlideError: the features are no floating-point numbers.
    """
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        raise refuse(path, f"features are {dtype}", "Save them as float16 or float32.")
    return hints.dtype or ("float16" if dtype.itemsize == 2 else "float32")


def convert(path: Path, rows: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Rows in the dtype that is stored.

    Raises:
        SlideError: a finite value is too large for it.
    """
    try:
        with np.errstate(over="raise"):
            return np.ascontiguousarray(rows, STORED_AS[dtype])
    except FloatingPointError as error:
        raise refuse(
            path, f"features are too large for {dtype}", "Import with --dtype float32."
        ) from error


def check_coords(path: Path, coords: npt.NDArray[Any], rows: int) -> npt.NDArray[np.int64]:
    """Coordinates as int64 [N, 2], in level-0 px.

    Raises:
        SlideError: not as many as features, another shape, or outside of int32.
    """
    coords = coords.reshape(as_rows(coords.shape))
    if coords.size == 0 and rows == 0:
        return np.empty((0, 2), np.int64)
    if coords.ndim != 2 or coords.shape[1] < 2 or coords.shape[0] != rows:
        raise refuse(path, f"{rows} rows of features but coordinates of shape {coords.shape}")
    corners = coords[:, :2]
    limits = np.iinfo(np.int32)
    if not np.isfinite(corners).all() or corners.min() < limits.min or corners.max() > limits.max:
        raise refuse(path, "coordinates are not finite level-0 pixels")
    whole: npt.NDArray[np.int64] = np.rint(corners).astype(np.int64)
    if (whole != corners).any():
        raise refuse(path, "coordinates are not whole level-0 pixels")
    return whole


def number(attrs: Mapping[str, Any], name: str) -> int | float | None:
    """A number among a file's attributes; None where it is missing, or the text 'None'."""
    value = attrs.get(name)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def facts(
    source: str,
    original: dict[str, Any],
    *,
    tile_px_level0: float | None = None,
    level0_size: tuple[int | float | None, int | float | None] = (None, None),
    mpp: float | None = None,
    has_coords: bool = True,
) -> dict[str, Any]:
    """A slide's attributes in the store's own words, and the file's verbatim."""
    about: dict[str, Any] = {
        "imported": {"format": source, "attrs": original},
        "coords_convention": COORDS if has_coords else None,
        "order": "as_imported",
    }
    if tile_px_level0 is not None:
        about["tile_px_level0"] = tile_px_level0
    if None not in level0_size:
        about["level0_size"] = list(level0_size)
    if mpp is not None:
        about["mpp"] = {"level0": mpp, "source": "imported"}
    return about
