"""The long-lived process that reads HDF5 files for us, replaced when a file kills or hangs it.

Damaged files make HDF5 loop for ever, or crash, inside of C: no exception comes of it.
"""

import atexit
import errno
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import SlideError
from hmil_fast.io.interchange.bag import refuse

PATIENCE_SECONDS = 30.0
_BYTES_A_SECOND = 10e6  # a slow disk reads this much
_PIPE_BYTES = 2**20


class _Gone(Exception):
    """The process has ended, or did not answer in time."""


class H5Process:
    """A child that holds HDF5 files open, by number; unusable once it has gone."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hmil_fast.io.interchange.h5_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pipesize=_PIPE_BYTES,
            start_new_session=True,  # Ctrl-C is for us; the end of its stdin ends it
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self._numbers = count()
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def next_number(self) -> int:
        """A number for a file that is to be opened."""
        return next(self._numbers)

    def ask(
        self, path: Path, asked: dict[str, Any], block: npt.NDArray[Any] | None = None
    ) -> tuple[Any, npt.NDArray[Any] | None]:
        """One request about a file, and its answer: a JSON value, or an array.

        Raises:
            SlideError: the file is damaged: it does not fit, or it ended or hung the process.
            FileExistsError: a file to be created is there.
            OSError: it cannot be written.
        """
        size = 0
        with suppress(OSError):
            size = path.stat().st_size
        seconds = PATIENCE_SECONDS + size / _BYTES_A_SECOND
        request = asked | {"path": str(path), "seconds": seconds}
        try:
            with self._lock:
                facts, array = self._exchange(request, block, time.monotonic() + seconds)
        except _Gone:
            raise self._post_mortem(path, seconds) from None
        except BaseException:  # its answer would be taken for that of the next request
            self.end()
            raise
        if "refused" in facts:
            raise SlideError(*facts["refused"])
        if "exists" in facts:
            raise FileExistsError(path)
        if "failed" in facts:
            number, text = facts["failed"]
            raise OSError(number or errno.EIO, text, str(path))
        return facts.get("value"), array

    def end(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def _post_mortem(self, path: Path, seconds: float) -> SlideError:
        with suppress(subprocess.TimeoutExpired):  # its pipe closes before it is gone
            self._process.wait(1)
        code = self._process.poll()
        self.end()
        if code is None or code == -signal.SIGALRM:
            why = f"was not read within {seconds:.0f} s: it is damaged, or its disk hangs"
        else:
            how = signal.Signals(-code).name if code < 0 else f"code {code}"
            why = f"ended the process that read it, by {how}: it is damaged"
        return refuse(path, why)

    def _exchange(
        self, request: dict[str, Any], block: npt.NDArray[Any] | None, until: float
    ) -> tuple[dict[str, Any], npt.NDArray[Any] | None]:
        try:
            for part in message(request, block):
                left = part
                while left:
                    self._wait(self._to, select.POLLOUT, until)
                    left = left[os.write(self._to, left) :]
            length = int.from_bytes(self._receive(8, until), "little")
            facts: dict[str, Any] = json.loads(self._receive(length, until).tobytes())
            if "array" not in facts:
                return facts, None
            shape, kind = facts["array"]
            dtype = np.dtype(kind)
            data = self._receive(int(np.prod(shape)) * dtype.itemsize, until)
            return facts, data.view(dtype).reshape(shape)
        except (BrokenPipeError, ConnectionResetError):
            raise _Gone from None

    def _receive(self, size: int, until: float) -> npt.NDArray[np.uint8]:
        data = np.empty(size, np.uint8)
        left = data.data
        while left:
            self._wait(self._from, select.POLLIN, until)
            got = os.readv(self._from, [left])
            if not got:
                raise _Gone
            left = left[got:]
        return data

    def _wait(self, fd: int, event: int, until: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise _Gone


def message(facts: dict[str, Any], array: npt.NDArray[Any] | None) -> list[memoryview]:
    """What goes over the pipe for an object and an array."""
    if array is not None:
        facts = facts | {"array": [array.shape, array.dtype.str]}
    text = json.dumps(facts).encode()
    parts = [memoryview(len(text).to_bytes(8, "little") + text)]
    if array is not None and array.size:
        parts.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return parts


_current: H5Process | None = None


def h5_process() -> H5Process:
    """The process to ask: the one at hand, or a new one."""
    global _current  # noqa: PLW0603  # one for the whole program
    if _current is None or not _current.alive():
        _current = H5Process()
        atexit.register(_current.end)
    return _current
