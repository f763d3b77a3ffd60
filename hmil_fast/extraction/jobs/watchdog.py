"""Watchdog: end a process that finishes no tile for too long."""

import math
import signal
import threading
import time
from collections.abc import Callable

Watchdog = Callable[[bool], None]


def worker_watchdog(seconds: float) -> Watchdog:
    """A watchdog that ends a worker by SIGALRM, whose default action works whatever hangs.

    Returns:
        A function to call after every step, with whether the process holds slides.
    """

    def reset(busy: bool) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds if busy else 0)

    return reset


def thread_watchdog(seconds: float, on_hang: Callable[[], None]) -> Watchdog:
    """A watchdog that calls `on_hang` in a thread, for a job that runs in the user's process.

    Returns:
        A function to call after every step, with whether the process holds slides.
    """
    deadline = math.inf

    def reset(busy: bool) -> None:
        nonlocal deadline
        deadline = time.monotonic() + seconds if busy else math.inf

    def wait() -> None:
        while time.monotonic() < deadline:
            time.sleep(min(1.0, seconds / 10))
        on_hang()

    threading.Thread(target=wait, name="watchdog", daemon=True).start()
    return reset
