"""Read HDF5 files of other tools with limits, and write ours in one piece.

HDF5 itself runs in another process: a damaged file costs that process, not the job.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import HmilError, SlideError
from hmil_fast.io.interchange.bag import Bag, Hints, check_shape, convert, refuse, target_dtype
from hmil_fast.io.interchange.h5_process import H5Process, h5_process
from hmil_fast.io.store.layout import STORED_AS

Arrays = Mapping[str, Bag | npt.NDArray[Any]]


@dataclass(frozen=True)
class H5File:
    """A file that is open in the other process."""

    path: Path
    number: int
    process: H5Process

    def ask(self, do: str, name: str = "/", **more: Any) -> Any:
        """The answer to a request about this file.

        Raises:
            SlideError: it is damaged.
        """
        asked = {"do": do, "file": self.number, "name": name, **more}
        value, array = self.process.ask(self.path, asked, asked.pop("block", None))
        return value if array is None else array

    def close(self) -> None:
        """Close it, if the process is still there."""
        if self.process.alive():
            self.ask("close")


@contextmanager
def open_h5(path: Path) -> Iterator[H5File]:
    """An HDF5 file for reading, without the locks that network file systems lack.

    Raises:
        SlideError: it is damaged, now or when something in it is read.
    """
    with _opened(path, "open") as file:
        try:
            yield file
        except HmilError:
            raise
        except (KeyError, ValueError, TypeError) as error:  # values that nobody would write
            raise refuse(path, f"is not a sound HDF5 file: {str(error)[:200]}") from error


@contextmanager
def _opened(path: Path, do: str) -> Iterator[H5File]:
    process = h5_process()
    file = H5File(path.absolute(), process.next_number(), process)
    file.ask(do)
    try:
        yield file
    except BaseException:
        with suppress(OSError, SlideError):
            file.close()
        raise
    file.close()


def shape(file: H5File, name: str) -> tuple[int, ...]:
    """Shape of a dataset whose bytes the file holds.

    Raises:
        SlideError: it is missing, lies in other files, or claims more than is there.
    """
    return tuple(file.ask("shape", name)["shape"])


def names(file: H5File, name: str) -> list[str]:
    """What a group holds, sorted; nothing where there is no such group."""
    found: list[str] = file.ask("names", name)
    return found


def array(file: H5File, name: str, rows: int) -> npt.NDArray[Any]:
    """A small dataset whole, of which `rows` rows are expected.

    Raises:
        SlideError: as `shape`, or it has another number of rows.
    """
    found = shape(file, name)
    if found[:1] != (rows,) or math.prod(found[1:]) > 16:
        raise refuse(file.path, f"{rows} rows of features but {name!r} of shape {found}")
    return np.asarray(file.ask("rows", name, start=0, stop=rows))


def features(file: H5File, name: str, hints: Hints, **about: Any) -> Bag:
    """A Bag over a dataset of features; coords and the rest come in `about`.

    Raises:
        SlideError: not (N, D) floating-point numbers, or claims more than the file holds.
    """
    facts = file.ask("shape", name)
    size = check_shape(file.path, tuple(facts["shape"]))
    dtype = target_dtype(file.path, np.dtype(facts["dtype"]), hints)

    def read(start: int, stop: int) -> npt.NDArray[Any]:
        return convert(file.path, file.ask("rows", name, start=start, stop=stop), dtype)

    return Bag(size, dtype, read, **about)


def attrs_of(file: H5File, name: str) -> dict[str, Any]:
    """The attributes of a group or dataset as JSON values; "/" for those of the file.

    Raises:
        SlideError: there are too many, or one is too long.
    """
    found: dict[str, Any] = file.ask("attrs", name)
    return found


def write_h5(path: Path, arrays: Arrays, attrs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write datasets one after the other, contiguous: ten times quicker to read than (1, D) chunks.

    In the other process too: on a full disk HDF5 may crash.

    Args:
        path: A name that is not taken.
        arrays: Datasets; those of a Bag are written a block at a time.
        attrs: Attributes by dataset, "/" for those of the file; None is written as 'None'.

    Raises:
        OSError: the disk refuses.
    """
    try:
        with _opened(path, "create") as file:
            for name, values in arrays.items():
                _add(file, name, values)
            for name, about in attrs.items():
                plain = {key: _plain(value) for key, value in about.items()}
                file.ask("set", name, attrs=plain)
    except SlideError as error:  # the process ended
        raise OSError(f"{error.what}") from error


def _add(file: H5File, name: str, values: Bag | npt.NDArray[Any]) -> None:
    kind = np.dtype(STORED_AS[values.dtype]) if isinstance(values, Bag) else values.dtype
    file.ask("add", name, shape=values.shape, dtype=kind.str)
    start = 0
    for block in values.blocks() if isinstance(values, Bag) else [values]:
        if len(block):
            file.ask("write", name, start=start, block=block)
        start += len(block)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value
