"""Describe a stored slide for export, and the files that a format writes for it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import SlideError
from hmil_fast.io.interchange import h5
from hmil_fast.io.interchange.bag import Bag, Hints


@dataclass(frozen=True)
class Outgoing:
    """One slide of a store.

    Attributes:
        slide_id: Its id.
        name: The id escaped, for file names.
        bag: Its good tiles, float16 or float32.
        encoder: Name of the encoder.
        tiling: The store's, which tells what a tile is.
        attrs: The slide's attributes.
        mpp: Level-0 µm/px, where known.
    """

    slide_id: str
    name: str
    bag: Bag
    encoder: str
    tiling: dict[str, Any]
    attrs: dict[str, Any]
    mpp: float | None

    @property
    def tile_px_level0(self) -> float | None:
        """Side of a tile in level-0 px."""
        return self.attrs.get("tile_px_level0")

    @property
    def level0_size(self) -> tuple[int, int] | None:
        """(width, height) of the slide."""
        size = self.attrs.get("level0_size")
        return None if size is None else (size[0], size[1])

    @property
    def tile_px(self) -> int | None:
        """Side of a tile in px, as it was asked for."""
        return self.tiling.get("tile_px")

    @property
    def magnification(self) -> int | float | None:
        """Magnification of the tiles by the usual rule, 10 / mpp."""
        return self.tiling.get("magnification") or magnification(self.tiling.get("mpp"))

    def original(self, source: str) -> dict[str, Any]:
        """The attributes that the slide came with, if it was imported from that very format."""
        imported = self.attrs.get("imported", {})
        return imported.get("attrs", {}) if imported.get("format") == source else {}

    def needed_coords(self, target: str) -> npt.NDArray[np.int64]:
        """Coordinates, for formats that cannot do without.

        Raises:
            SlideError: the slide was imported without.
        """
        if self.bag.coords is None:
            raise SlideError(
                f"slide {self.slide_id!r} has no coordinates, which {target} files need",
                "Export it with --format npy or pt, or import it again with --coords.",
            )
        return self.bag.coords

    def needed_side(self, target: str) -> float:
        """Side of a tile in level-0 px, for formats that cannot do without.

        Raises:
            SlideError: the slide was imported without.
        """
        if self.tile_px_level0 is None:
            raise SlideError(
                f"slide {self.slide_id!r} states no size of its tiles, which {target} files need",
                "Export it with --format npy or pt, or import it again with --coords.",
            )
        return self.tile_px_level0


@dataclass(frozen=True)
class Part:
    """A file to write.

    Attributes:
        path: Where.
        write: Writes it, under the name given.
        same: Whether a file that lies there already holds the same.
    """

    path: Path
    write: Callable[[Path], None]
    same: Callable[[Path, Hints], bool]


def magnification(mpp: float | None) -> int | None:
    """Nominal magnification of a resolution in µm/px: 0.5 is 20."""
    return None if mpp is None else round(10 / mpp)


def as_float32(slide: Outgoing) -> Outgoing:
    """The slide with features in float32, for formats that know nothing else."""
    bag = slide.bag

    def read(start: int, stop: int) -> npt.NDArray[Any]:
        return bag.read(start, stop).astype(np.float32)

    return replace(slide, bag=replace(bag, read=read, dtype="float32"))


def same_bag(one: Bag, other: Bag) -> bool:
    """Whether two bags hold the same bits; coordinates count where both have some."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if (
        one.coords is not None
        and other.coords is not None
        and not np.array_equal(one.coords, other.coords)
    ):
        return False
    return all(
        np.array_equal(a.view(np.uint8), b.view(np.uint8))
        for a, b in zip(one.blocks(), other.blocks(), strict=True)
    )


def h5_part(
    path: Path,
    again: Callable[..., AbstractContextManager[Bag]],
    arrays: h5.Arrays,
    attrs: Mapping[str, Mapping[str, Any]],
) -> Part:
    """An HDF5 file, and how to read it back to compare."""
    bag = next(values for values in arrays.values() if isinstance(values, Bag))

    def same(found: Path, hints: Hints) -> bool:
        with again(found, hints=hints) as there:
            return same_bag(bag, there)

    return Part(path, lambda to: h5.write_h5(to, arrays, attrs), same)
