"""Turn Ctrl-C and SIGTERM into a flag that training checks between steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hmil_fast.errors import Stopped


@contextmanager
def stop_flag(*, ignore_second: bool = False) -> Iterator[list[int]]:
    """Yield a list to which Ctrl-C and SIGTERM append their number; a second one stops at once.

    Args:
        ignore_second: Ignore a second signal: torchrun passes on signals that its processes have
            received already.
    """
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stopped and not ignore_second:
            raise Stopped(number)
        stopped.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
