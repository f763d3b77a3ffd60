"""slide2vec: `tile_embeddings/<slide>.pt` or `.npz`, coordinates in `tiles/`, JSON beside both.

A slide without tiles has the JSON alone. Classes of annotations are folders on both sides.
"""

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import SlideError
from hmil_fast.io.interchange import pt
from hmil_fast.io.interchange.bag import (
    Bag,
    Hints,
    as_rows,
    check_coords,
    check_shape,
    convert,
    facts,
    number,
    refuse,
    target_dtype,
)

FOLDER = "tile_embeddings"
META = ".meta.json"
SUFFIXES = (".pt", ".npz", META)
COORDS_SUFFIXES = (".coordinates.npz", f".coordinates{META}")
_MOST_COMPRESSION = 16
_MOST_JSON_BYTES = 4 * 2**20
_FOREIGN = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)


@contextmanager
def read(path: Path, slide_id: str, hints: Hints) -> Iterator[Bag]:
    """Open one slide's features, with what the files beside it say of its tiles."""
    stem = next(path.name.removesuffix(s) for s in SUFFIXES if path.name.endswith(s))
    meta = _json(path.with_name(stem + META))
    kind = meta.get("artifact_type", FOLDER)
    if kind != FOLDER:
        raise refuse(path, f"holds {kind}", f"Name the folder {FOLDER} of slide2vec's output.")
    folder = _coords_folder(path, stem, hints)
    about = {} if folder is None else _json(folder / (stem + COORDS_SUFFIXES[1]))
    with _features(path, meta, slide_id, hints) as bag:
        if "num_tiles" in meta and number(meta, "num_tiles") != bag.shape[0]:
            raise refuse(
                path,
                f"has {bag.shape[0]} tiles, its {META} says {meta['num_tiles']}: half written?",
            )
        coords = _coords(folder, stem, bag.shape[0])
        if coords is None and hints.coords is not None:
            raise refuse(
                hints.coords / (stem + COORDS_SUFFIXES[0]),
                "there is no such file of coordinates",
                "Name slide2vec's folder `tiles` with --coords.",
            )
        slide, tiling = (_part(about, name) for name in ("slide", "tiling"))
        size, level = slide.get("dimensions"), number(tiling, "read_level")
        read_px = number(tiling, "read_tile_size_px")
        sized = isinstance(size, list) and len(size) == 2
        attrs = facts(
            "slide2vec",
            {"features": meta, "coords": about},
            tile_px_level0=number(meta, "tile_size_lv0") or number(tiling, "tile_size_lv0"),
            level0_size=(size[0], size[1]) if sized and size else (None, None),
            mpp=hints.mpp_of(slide_id) or number(slide, "base_spacing_um"),
            has_coords=coords is not None,
        )
        if level is not None and read_px is not None:
            attrs |= {"level": level, "read_px": read_px}
        yield replace(
            bag,
            coords=coords,
            encoder=hints.encoder or meta.get("encoder_name"),
            tiling={
                "tile_px": number(meta, "requested_tile_size_px"),
                "mpp": number(meta, "requested_spacing_um"),
            },
            attrs=attrs,
            notes=() if coords is not None else ("it comes without coordinates",),
        )


@contextmanager
def _features(path: Path, meta: dict[str, Any], slide_id: str, hints: Hints) -> Iterator[Bag]:
    if path.suffix == ".pt":
        with pt.read(path, slide_id, replace(hints, coords=None)) as bag:
            yield bag
    elif path.suffix == ".npz":
        yield _npz_bag(path, hints)
    elif meta.get("num_tiles") == 0:
        width = number(meta, "feature_dim") or 0
        yield Bag((0, int(width)), hints.dtype or "float32", _nothing, None)
    else:
        raise refuse(path, "its file of features, .pt or .npz, is missing", "Run slide2vec again.")


def _nothing(start: int, stop: int) -> npt.NDArray[Any]:
    raise IndexError(f"no rows {start} to {stop}")


def _npz_bag(path: Path, hints: Hints) -> Bag:
    shape, dtype, load = _npz(path, "features")
    size = check_shape(path, shape)
    target = target_dtype(path, dtype, hints)

    def read(start: int, stop: int) -> npt.NDArray[Any]:
        return convert(path, load().reshape(as_rows(shape))[start:stop], target)

    return Bag(size, target, read, None)


def _coords_folder(path: Path, stem: str, hints: Hints) -> Path | None:
    """Where the coordinates lie: below --coords, or the folder `tiles` beside `tile_embeddings`."""
    above = [path.parent, *path.parent.parents]
    root = next((p for p in above if p.name == FOLDER), None)
    if hints.coords is None:
        return None if root is None else root.parent / "tiles" / path.parent.relative_to(root)
    # of the file's own folders, as many as lie below --coords too
    folders = [hints.coords / path.parent.relative_to(p) for p in reversed(above)]
    return next((f for f in folders if (f / (stem + COORDS_SUFFIXES[1])).is_file()), hints.coords)


def _coords(folder: Path | None, stem: str, rows: int) -> npt.NDArray[np.int64] | None:
    """Corners [rows, 2], None where there is no file of them."""
    if rows == 0:
        return np.empty((0, 2), np.int64)
    if folder is None or not (path := folder / (stem + COORDS_SUFFIXES[0])).is_file():
        return None
    axes = []
    for name in ("x", "y"):
        shape, dtype, load = _npz(path, name)
        if shape != (rows,) or dtype.kind not in "iuf":
            raise refuse(path, f"{rows} rows of features but {name!r} is {dtype} {shape}")
        axes.append(load())
    return check_coords(path, np.stack(axes, 1), rows)


def _npz(
    path: Path, name: str
) -> tuple[tuple[int, ...], np.dtype[Any], Callable[[], npt.NDArray[Any]]]:
    """Shape and dtype of an array in an .npz file, and how to read it.

    Raises:
        SlideError: not there, damaged, of objects, or far larger than the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            info = infos.get(f"{name}.npy")
            if info is None:
                there = ", ".join(sorted(infos)[:8]) or "nothing"
                raise refuse(path, f"has no array {name!r}, but {there}", "Check --format.")
            with archive.open(info) as file:
                shape, dtype = _header(file)
    except _FOREIGN as error:
        raise _damaged(path, error) from error
    claimed = math.prod(shape) * dtype.itemsize
    most = info.file_size if name != "features" else _MOST_COMPRESSION * info.compress_size
    if dtype.hasobject or claimed > min(most, info.file_size):
        raise refuse(
            path,
            f"{name!r} claims {claimed:,} bytes of {dtype}, packed in {info.compress_size:,}",
            "Save it with numpy.savez, or as .pt.",
        )

    @cache
    def load() -> npt.NDArray[Any]:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
                found: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
                return found
        except _FOREIGN as error:
            raise _damaged(path, error) from error

    return shape, dtype, load


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    known = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in known:
        raise ValueError(f"version {version} of .npy")
    shape, _, dtype = known[version](file)
    return shape, dtype


def _damaged(path: Path, error: Exception) -> SlideError:
    return refuse(path, f"is not a sound .npz file: {str(error)[:200]}")


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file says; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise ValueError("over 4 MiB")
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda word: None)
        if not isinstance(found, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(path, f"is not a sound JSON: {str(error)[:200]}") from error
    return found


def _part(about: dict[str, Any], name: str) -> dict[str, Any]:
    found = about.get(name)
    return found if isinstance(found, dict) else {}
