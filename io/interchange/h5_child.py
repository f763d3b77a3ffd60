"""The process that touches HDF5 files: `python -m hmil_fast.io.interchange.h5_child`.

It answers requests on stdin, one at a time, on stdout. A message is the length of a JSON object in
8 bytes, the object, and the bytes of an array where the object says that one follows. A dataset is
only touched when the file really holds its bytes: a few hundred bytes can declare terabytes, a
half-written file reads as zeros, and links or external storage can name any file of this machine.
"""

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt

from hmil_fast.errors import HmilError
from hmil_fast.io.interchange.bag import as_rows, refuse
from hmil_fast.io.interchange.h5_process import message

_MOST_COMPRESSION = 16
_MOST_CHUNK_BYTES = 256 * 2**20
_MOST_ATTR_BYTES = 2**20
_MOST_ATTRS = 256
_MOST_NAMES = 1000

Request = dict[str, Any]
Answer = tuple[Any, npt.NDArray[Any] | None]
_files: dict[int, h5py.File] = {}


def find(file: h5py.File, name: str) -> Any:
    """The group or dataset of that name in this very file; None where there is none.

    Raises:
        SlideError: it is a link to somewhere else.
    """
    found = file
    for part in name.strip("/").split("/") if name != "/" else ():
        link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise refuse(Path(file.filename), f"{name!r} is a link to somewhere else")
        found = found[part]
    return found


def dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset whose bytes the file holds.

    Raises:
        SlideError: it is missing, lies in other files, or claims more than is there.
    """
    path = Path(file.filename)
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


def _open(asked: Request) -> Answer:
    _files[asked["file"]] = h5py.File(asked["path"], "r", locking=False)
    return None, None


def _create(asked: Request) -> Answer:
    _files[asked["file"]] = h5py.File(asked["path"], "x")
    return None, None


def _close(asked: Request) -> Answer:
    _files.pop(asked["file"]).close()
    return None, None


def _shape(asked: Request) -> Answer:
    data = dataset(_files[asked["file"]], asked["name"])
    return {"shape": as_rows(data.shape), "dtype": data.dtype.str}, None


def _rows(asked: Request) -> Answer:
    data = dataset(_files[asked["file"]], asked["name"])
    rows = slice(asked["start"], asked["stop"])
    batch = len(data.shape) == 3 and data.shape[0] == 1
    found = np.asarray(data[0, rows] if batch else data[rows])
    return None, found.reshape(len(found), *as_rows(data.shape)[1:])


def _names(asked: Request) -> Answer:
    group = find(_files[asked["file"]], asked["name"])
    names = sorted(group) if isinstance(group, h5py.Group) and len(group) <= _MOST_NAMES else []
    return names, None


def _attrs(asked: Request) -> Answer:
    file = _files[asked["file"]]
    path, item = Path(file.filename), find(file, asked["name"])
    if len(item.attrs) > _MOST_ATTRS:
        raise refuse(path, f"has {len(item.attrs)} attributes")
    for name in item.attrs:
        if item.attrs.get_id(name).get_storage_size() > _MOST_ATTR_BYTES:
            raise refuse(path, f"attribute {name!r} is over {_MOST_ATTR_BYTES:,} bytes")
    return {name: _plain(item.attrs[name]) for name in item.attrs}, None


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


def _add(asked: Request) -> Answer:
    _files[asked["file"]].create_dataset(asked["name"], tuple(asked["shape"]), asked["dtype"])
    return None, None


def _write(asked: Request) -> Answer:
    block = asked["block"]
    data = _files[asked["file"]][asked["name"]]
    data[asked["start"] : asked["start"] + len(block)] = block
    return None, None


def _set(asked: Request) -> Answer:
    attrs = _files[asked["file"]][asked["name"]].attrs
    for key, value in asked["attrs"].items():
        attrs[key] = "None" if value is None else value
    return None, None


_READING = {"open": _open, "shape": _shape, "rows": _rows, "names": _names, "attrs": _attrs}
_WRITING = {"create": _create, "add": _add, "write": _write, "set": _set, "close": _close}


def _answer(asked: Request) -> tuple[dict[str, Any], npt.NDArray[Any] | None]:
    act: Callable[[Request], Answer] = (_READING | _WRITING)[asked["do"]]
    try:
        value, array = act(asked)
    except HmilError as error:
        return {"refused": [error.what, error.fix]}, None
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, FileExistsError):
            return {"exists": True}, None
        if asked["do"] in _WRITING:  # a RuntimeError is what h5py makes of a full disk
            number = getattr(error, "errno", None) or 0
            return {"failed": [number, str(error)[:200]]}, None
        problem = refuse(Path(asked["path"]), f"is no sound HDF5 file: {str(error)[:200]}")
        return {"refused": [problem.what, problem.fix]}, None
    return {"value": value}, array


def read_message(source: BinaryIO) -> Request | None:
    """The next request, its array under "block"; None at the end."""
    head = source.read(8)
    if len(head) < 8:
        return None
    asked: Request = json.loads(source.read(int.from_bytes(head, "little")))
    if "array" in asked:
        shape, dtype = asked.pop("array")
        asked["block"] = np.empty(shape, dtype)
        flat = asked["block"].reshape(-1).view(np.uint8)
        flat[:] = np.frombuffer(source.read(flat.nbytes), np.uint8)
    return asked


def main() -> None:
    """Answer until stdin ends; a request that takes too long ends the process, whatever hangs."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    while (asked := read_message(sys.stdin.buffer)) is not None:
        # the default action of SIGALRM needs no Python, which a loop in C keeps from running
        signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
        facts, array = _answer(asked)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for part in message(facts, array):
            answers.write(part)
        answers.flush()


if __name__ == "__main__":
    main()
