"""Read and write HDF5 files in a process of its own, which `h5_process` starts.

It answers one request after the other over two connections whose descriptors are its arguments. A
dataset is only read when the file really holds its bytes: a few hundred bytes can declare
terabytes, a half-written file reads as zeros, and links or external storage can name any file of
this machine.
"""

import math
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hmil_fast.errors import HmilError
from hmil_fast.io.interchange.bag import as_rows, refuse
from hmil_fast.io.interchange.h5_process import receive, send

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


def _open(request: Request) -> Answer:
    _files[request["file"]] = h5py.File(request["path"], "r", locking=False)
    return None, None


def _create(request: Request) -> Answer:
    _files[request["file"]] = h5py.File(request["path"], "x")
    return None, None


def _close(request: Request) -> Answer:
    _files.pop(request["file"]).close()
    return None, None


def _shape(request: Request) -> Answer:
    data = dataset(_files[request["file"]], request["name"])
    return {"shape": as_rows(data.shape), "dtype": data.dtype.str}, None


def _rows(request: Request) -> Answer:
    data = dataset(_files[request["file"]], request["name"])
    rows = slice(request["start"], request["stop"])
    batch = len(data.shape) == 3 and data.shape[0] == 1
    found = np.asarray(data[0, rows] if batch else data[rows])
    return None, found.reshape(len(found), *as_rows(data.shape)[1:])


def _names(request: Request) -> Answer:
    group = find(_files[request["file"]], request["name"])
    names = sorted(group) if isinstance(group, h5py.Group) and len(group) <= _MOST_NAMES else []
    return names, None


def _attrs(request: Request) -> Answer:
    file = _files[request["file"]]
    path, item = Path(file.filename), find(file, request["name"])
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


def _add(request: Request) -> Answer:
    _files[request["file"]].create_dataset(
        request["name"], tuple(request["shape"]), request["dtype"]
    )
    return None, None


def _write(request: Request) -> Answer:
    block = request["block"]
    data = _files[request["file"]][request["name"]]
    data[request["start"] : request["start"] + len(block)] = block
    return None, None


def _set(request: Request) -> Answer:
    attrs = _files[request["file"]][request["name"]].attrs
    for key, value in request["attrs"].items():
        attrs[key] = "None" if value is None else value
    return None, None


_READING = {"open": _open, "shape": _shape, "rows": _rows, "names": _names, "attrs": _attrs}
_WRITING = {"create": _create, "add": _add, "write": _write, "set": _set, "close": _close}


def _answer(request: Request) -> tuple[dict[str, Any], npt.NDArray[Any] | None]:
    act: Callable[[Request], Answer] = (_READING | _WRITING)[request["do"]]
    try:
        value, array = act(request)
    except HmilError as error:
        return {"refused": [error.what, error.fix]}, None
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, FileExistsError):
            return {"exists": True}, None
        if request["do"] in _WRITING:  # a RuntimeError is what h5py makes of a full disk
            number = getattr(error, "errno", None) or 0
            return {"failed": [number, str(error)[:200]]}, None
        problem = refuse(Path(request["path"]), f"is not a sound HDF5 file: {str(error)[:200]}")
        return {"refused": [problem.what, problem.fix]}, None
    return {"value": value}, array


def main(requests: Connection, answers: Connection) -> None:
    """Answer until the connections end; a request that takes too long ends the process."""
    while True:
        try:
            request, block = receive(requests)
        except (EOFError, OSError):
            return
        # the default action of SIGALRM needs no Python, which a loop in C keeps from running
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        facts, array = _answer(request | {"block": block})
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(answers, facts, array)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1]), writable=False), Connection(int(sys.argv[2]), readable=False))
