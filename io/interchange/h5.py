"""HDF5 files that strangers wrote, read with limits; ours, written in one piece.

A dataset is only touched when the file really holds its bytes: a few hundred bytes can declare
terabytes, a half-written file reads as zeros, and links or external storage can name any file of
this machine.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import HmilError, UsageError
from hmil_fast.io.interchange.bag import Bag, Hints, check_shape, convert, refuse, target_dtype
from hmil_fast.io.store.layout import STORED_AS

Arrays = Mapping[str, Bag | npt.NDArray[Any]]

_MOST_COMPRESSION = 16
_MOST_CHUNK_BYTES = 256 * 2**20
_MOST_ATTR_BYTES = 2**20
_MOST_ATTRS = 256


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UsageError("this format needs h5py", "run `pip install h5py`") from error
    return h5py


@contextmanager
def open_h5(path: Path) -> Iterator[Any]:
    """An HDF5 file for reading, without the locks that network file systems lack.

    Raises:
        SlideError: it is damaged, now or when something in it is read.
    """
    h5py = _h5py()
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except HmilError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise refuse(path, f"is no sound HDF5 file: {str(error)[:200]}") from error


def find(file: Any, name: str) -> Any:
    """The group or dataset of that name in this very file; None where there is none.

    Raises:
        SlideError: it is a link to somewhere else.
    """
    h5py, found = _h5py(), file
    for part in name.split("/"):
        link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise refuse(Path(file.filename), f"{name!r} is a link to somewhere else")
        found = found[part]
    return found


def dataset(file: Any, name: str) -> Any:
    """A dataset whose bytes the file holds.

    Raises:
        SlideError: it is missing, lies in other files, or claims more than is there.
    """
    h5py, path = _h5py(), Path(file.filename)
    data = find(file, name)
    if not isinstance(data, h5py.Dataset):
        raise refuse(
            path,
            f"has no dataset {name!r}, but {', '.join(sorted(file)[:8]) or 'nothing'}",
            "Check --format, and that SOURCE is the folder of the features.",
        )
    if data.is_virtual or data.external or data.shape is None:
        raise refuse(path, f"{name!r} lies in other files")
    if data.dtype.kind not in "fiu":
        raise refuse(path, f"{name!r} is {data.dtype}, not numbers")
    claimed = math.prod(data.shape) * data.dtype.itemsize
    held = min(data.id.get_storage_size(), path.stat().st_size)
    if claimed > held * (_MOST_COMPRESSION if data.id.get_create_plist().get_nfilters() else 1):
        raise refuse(
            path, f"{name!r} claims {claimed:,} bytes, the file holds {held:,} of it: half written?"
        )
    if data.chunks and math.prod(data.chunks) * data.dtype.itemsize > _MOST_CHUNK_BYTES:
        raise refuse(path, f"{name!r} has chunks of shape {data.chunks}")
    return data


def array(file: Any, name: str, rows: int) -> npt.NDArray[Any]:
    """A small dataset whole, of which `rows` rows are expected.

    Raises:
        SlideError: as `dataset`, or it has another number of rows.
    """
    data = dataset(file, name)
    if data.shape[:1] != (rows,) or math.prod(data.shape[1:]) > 16:
        raise refuse(
            Path(file.filename), f"{rows} rows of features but {name!r} of shape {data.shape}"
        )
    return np.asarray(data[...])


def features(file: Any, name: str, hints: Hints, **about: Any) -> Bag:
    """A Bag over a dataset of features; coords and the rest come in `about`.

    Raises:
        SlideError: not (N, D) floating-point numbers, or claims more than the file holds.
    """
    path, data = Path(file.filename), dataset(file, name)
    shape = check_shape(path, data.shape)
    dtype = target_dtype(path, data.dtype, hints)

    def read(start: int, stop: int) -> npt.NDArray[Any]:
        return convert(path, data[start:stop], dtype)

    return Bag(shape, dtype, read, **about)


def attrs_of(item: Any) -> dict[str, Any]:
    """The attributes of a group or dataset as JSON values.

    Raises:
        SlideError: there are too many, or one is too long.
    """
    path = Path(item.file.filename)
    if len(item.attrs) > _MOST_ATTRS:
        raise refuse(path, f"has {len(item.attrs)} attributes")
    for name in item.attrs:
        if item.attrs.get_id(name).get_storage_size() > _MOST_ATTR_BYTES:
            raise refuse(path, f"attribute {name!r} is over {_MOST_ATTR_BYTES:,} bytes")
    return {name: _plain(item.attrs[name]) for name in item.attrs}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)[:1000]


def write_h5(path: Path, arrays: Arrays, attrs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write datasets one after the other, contiguous: ten times quicker to read than (1, D) chunks.

    Args:
        path: A name that is not taken.
        arrays: Datasets; those of a Bag are written a block at a time.
        attrs: Attributes by dataset, "/" for those of the file; None is written as 'None'.

    Raises:
        OSError: the disk refuses.
    """
    h5py = _h5py()
    try:
        with h5py.File(path, "x") as file:
            for name, values in arrays.items():
                if isinstance(values, Bag):
                    data = file.create_dataset(name, values.shape, STORED_AS[values.dtype])
                    start = 0
                    for block in values.blocks():
                        data[start : start + len(block)] = block
                        start += len(block)
                else:
                    file.create_dataset(name, data=values)
            for name, about in attrs.items():
                for key, value in about.items():
                    file[name].attrs[key] = "None" if value is None else value
    except RuntimeError as error:  # what h5py makes of a full disk
        raise OSError(str(error)[:200]) from error
