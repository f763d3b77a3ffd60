"""Lock a run folder, so that one process trains it at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from hmil_fast.errors import UsageError


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
