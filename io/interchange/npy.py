"""A folder of `<slide>.npy` (N, D); coordinates, where there are any, beside as `.coords.npy`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmil_fast.io.interchange.bag import (
    Bag,
    Hints,
    as_rows,
    check_coords,
    check_shape,
    convert,
    facts,
    refuse,
    target_dtype,
)
from hmil_fast.io.interchange.outgoing import Outgoing, Part, same_bag
from hmil_fast.io.interchange.tiles import Tiles, companion

COORDS_SUFFIX = ".coords.npy"


def load(path: Path) -> npt.NDArray[Any]:
    """A mapped array: the file must hold what its header claims, and nothing is read yet.

    Raises:
        SlideError: no .npy file, truncated, or one with objects in it.
    """
    try:
        with np.errstate(over="raise"):  # of a size that does not fit 64 bits
            found = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever the parser of a foreign file raises
        raise refuse(path, f"is not a sound .npy file: {str(error)[:200]}") from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise refuse(path, "is an archive of arrays", "Save one array a file.")
    return found


def beside(
    path: Path, rows: int, hints: Hints
) -> tuple[npt.NDArray[np.int64] | None, Tiles | None]:
    """Coordinates of a file that has none in it: `.coords.npy` beside it, or from --coords."""
    tiles = companion(path, hints.coords, rows)
    if tiles is not None:
        return tiles.coords, tiles
    name = path.with_name(f"{path.stem}{COORDS_SUFFIX}")
    if not name.is_file():
        return None, None
    coords = load(name)
    if coords.dtype.kind not in "iuf":
        raise refuse(name, f"coordinates are {coords.dtype}")
    return check_coords(name, coords, rows), None


def about(
    source: str, slide_id: str, hints: Hints, coords: object, tiles: Tiles | None
) -> dict[str, Any]:
    """The fields of a Bag over a file that holds nothing but features."""
    return {
        "coords": coords,
        "encoder": hints.encoder,
        "tiling": {} if tiles is None else tiles.tiling,
        "attrs": facts(
            source,
            {} if tiles is None else {"coords": tiles.original},
            tile_px_level0=None if tiles is None else tiles.side,
            level0_size=(None, None) if tiles is None else tiles.level0_size,
            mpp=hints.mpp_of(slide_id),
            has_coords=coords is not None,
        ),
        "notes": () if coords is not None else ("it comes without coordinates",),
    }


@contextmanager
def read(path: Path, slide_id: str, hints: Hints) -> Iterator[Bag]:
    """Open one slide's features."""
    data = load(path)
    shape = check_shape(path, data.shape)
    data = data.reshape(as_rows(data.shape))
    dtype = target_dtype(path, data.dtype, hints)
    coords, tiles = beside(path, shape[0], hints)
    yield Bag(
        shape,
        dtype,
        lambda start, stop: convert(path, data[start:stop], dtype),
        **about("npy", slide_id, hints, coords, tiles),
    )


def parts(folder: Path, slide: Outgoing) -> list[Part]:
    """The files to write, coordinates first."""

    def write(to: Path) -> None:
        with to.open("xb") as file:
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(slide.bag.dtype)),
                "fortran_order": False,
                "shape": slide.bag.shape,
            }
            np.lib.format.write_array_header_1_0(file, header)
            for block in slide.bag.blocks():
                file.write(block.data)

    def same(found: Path, hints: Hints) -> bool:
        with read(found, slide.slide_id, hints) as there:
            return same_bag(slide.bag, there)

    return [*coords_part(folder, slide), Part(folder / f"{slide.name}.npy", write, same)]


def coords_part(folder: Path, slide: Outgoing) -> list[Part]:
    """The file of coordinates beside the features, int32 (N, 2), where there are any."""
    coords = slide.bag.coords
    if coords is None:
        return []

    def write(to: Path, values: npt.NDArray[Any]) -> None:
        with to.open("xb") as file:
            np.save(file, values.astype(np.int32), allow_pickle=False)

    def same(found: Path, hints: Hints) -> bool:
        return np.array_equal(load(found), coords)

    put: Callable[[Path], None] = partial(write, values=coords)
    return [Part(folder / f"{slide.name}{COORDS_SUFFIX}", put, same)]
