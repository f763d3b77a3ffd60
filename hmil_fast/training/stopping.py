"""Ctrl-C and SIGTERM end a training between two steps; one run folder has one training."""

import fcntl
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from hmil_fast.errors import Stopped, UsageError


@contextmanager
def stop_flag(*, patient: bool = False) -> Iterator[list[int]]:
    """A list that fills with the signals Ctrl-C and SIGTERM; the second one stops at once.

    Args:
        patient: The second does not: torchrun passes on what its processes got themselves.
    """
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stopped and not patient:
            raise Stopped(number)
        stopped.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def own_log(path: Path) -> Iterator[TextIO]:
    """A run's log, open to append; nobody else trains the run meanwhile.

    Raises:
        UsageError: Another process trains it.
    """
    with path.open("a", encoding="utf-8") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another process trains the run {path.parent}", "wait for it, or stop it"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield log
