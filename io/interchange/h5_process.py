"""Send requests about HDF5 files to a process that a damaged file may crash or hang.

Damaged files make HDF5 loop for ever, or crash, in C code: no exception is raised. A process that
has ended is replaced by the next request.
"""

import atexit
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import SlideError
from hmil_fast.io.interchange.bag import refuse

PATIENCE_SECONDS = 30.0
_BYTES_A_SECOND = 10e6  # a slow disk reads this much


class H5Process:
    """A child process that holds HDF5 files open, by number; unusable once it has ended."""

    def __init__(self) -> None:
        # two pipes, whose buffers may be larger than those of a socket: half the time for rows
        requests, self._requests = wide_pipe()
        self._answers, answers = wide_pipe()
        ends = [requests.fileno(), answers.fileno()]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hmil_fast.io.interchange.h5_child", *map(str, ends)],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=2,  # what HDF5 prints
            start_new_session=True,  # Ctrl-C is for this process; the end of the connection ends it
        )
        requests.close()
        answers.close()
        self._late = False
        self._numbers = count()
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def alive(self) -> bool:
        """Return whether it still runs."""
        return self._process.poll() is None

    def next_number(self) -> int:
        """Return a new number for a file to open."""
        return next(self._numbers)

    def ask(
        self, path: Path, request: dict[str, Any], block: npt.NDArray[Any] | None = None
    ) -> tuple[Any, npt.NDArray[Any] | None]:
        """Send one request about a file and return the answer: a JSON value, or an array.

        Raises:
            SlideError: the file is damaged: it does not fit, or it ended or hung the process.
            FileExistsError: a file to be created exists.
            OSError: it cannot be written.
        """
        size = 0
        with suppress(OSError):
            size = path.stat().st_size
        seconds = PATIENCE_SECONDS + size / _BYTES_A_SECOND
        try:
            with self._lock, self._time_limit(seconds):
                send(self._requests, request | {"path": str(path), "seconds": seconds}, block)
                facts, array = receive(self._answers)
        except (EOFError, OSError):
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

    @contextmanager
    def _time_limit(self, seconds: float) -> Iterator[None]:
        """Kill the child process if the block takes longer than this many seconds."""
        timer = threading.Timer(seconds, self._end_late)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end_late(self) -> None:
        self._late = True
        self._process.kill()

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()

    def _post_mortem(self, path: Path, seconds: float) -> SlideError:
        with suppress(subprocess.TimeoutExpired):  # its connection closes before it has ended
            self._process.wait(1)
        code = self._process.poll()
        self.end()
        if self._late or code is None or code == -signal.SIGALRM:
            why = f"was not read within {seconds:.0f} s: it is damaged, or its disk hangs"
        else:
            how = signal.Signals(-code).name if code < 0 else f"code {code}"
            why = f"ended the process that read it, by {how}: it is damaged"
        return refuse(path, why)


def wide_pipe() -> tuple[Connection, Connection]:
    """Return the reading and the writing end of a pipe with a buffer of 1 MiB, where allowed."""
    reader, writer = Pipe(duplex=False)
    with suppress(OSError, AttributeError):  # the limit of the user, or not Linux
        fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, 2**20)
    return reader, writer


def send(connection: Connection, facts: dict[str, Any], array: npt.NDArray[Any] | None) -> None:
    """Send a JSON object, then the bytes of an array if there is one; nothing is pickled."""
    if array is not None:
        facts = facts | {"array": [array.shape, array.dtype.str]}
    connection.send_bytes(json.dumps(facts).encode())
    if array is not None:  # by itself: a Connection copies what it sends and receives
        left = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        while left:
            left = left[os.write(connection.fileno(), left) :]


def receive(connection: Connection) -> tuple[dict[str, Any], npt.NDArray[Any] | None]:
    """Receive what `send` sent.

    Raises:
        EOFError: the other end is closed.
        OSError: the same, in the middle of a message.
    """
    facts: dict[str, Any] = json.loads(connection.recv_bytes())
    if "array" not in facts:
        return facts, None
    array = np.empty(*facts.pop("array"))
    left = array.reshape(-1).view(np.uint8).data
    while left:
        size = os.readv(connection.fileno(), [left])
        if not size:
            raise EOFError
        left = left[size:]
    return facts, array


_current: H5Process | None = None


def h5_process() -> H5Process:
    """Return the running process, or start a new one."""
    global _current  # noqa: PLW0603  # one for the whole program
    if _current is None or not _current.alive():
        _current = H5Process()
        atexit.register(_current.end)
    return _current
