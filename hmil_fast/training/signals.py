"""Ctrl-C and SIGTERM end a training between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hmil_fast.errors import Stopped


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
