"""Measure the seconds that a job spends in each stage."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Timings:
    """Seconds per stage.

    Stages without a bracket are wall time of the thread that drives the job, one after the other.
    Those "(threads)" are work beside it, added up over the threads; "encode (GPU)" is what the
    device itself took for the encoder, of which the share of the wall time is the busy share.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, stage: str, seconds: float) -> None:
        """Add to a stage; from any thread."""
        with self._lock:
            self.seconds[stage] += seconds

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Add the time that a block takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)
