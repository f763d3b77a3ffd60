"""A process that holds slides and does no tile of them for too long comes to its end."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

Watch = Callable[[bool], None]


def alarm(seconds: float) -> Watch:
    """For a worker: SIGALRM ends it, whose default action needs no Python, whatever hangs.

    Returns:
        To be called after every step with whether the process holds slides.
    """

    def wind_up(busy: bool) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds if busy else 0)

    return wind_up


def last_words(minutes: float) -> Watch:
    """For a job of one process, whose threads can only be left by ending it: it says what to do."""
    until = math.inf

    def wind_up(busy: bool) -> None:
        nonlocal until
        until = time.monotonic() + 60 * minutes if busy else math.inf

    def look() -> None:
        while time.monotonic() < until:
            time.sleep(min(1.0, 6 * minutes))
        sys.stderr.write(
            f"\nhmil-fast: no tile was done for {minutes:g} minutes: a slide, or its disk, hangs\n"
            "Fix: run the same command with --workers 1: a worker that hangs is replaced, and the "
            "slide comes last\n"
        )
        sys.stderr.flush()
        os._exit(1)

    threading.Thread(target=look, name="watch", daemon=True).start()
    return wind_up
