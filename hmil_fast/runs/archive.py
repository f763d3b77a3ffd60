"""Rename a run folder to make place for another; nothing is deleted."""

import time
from contextlib import ExitStack
from pathlib import Path

from hmil_fast.runs.lock import own_log


def set_aside(path: Path) -> Path | None:
    """Rename a run folder to `<path>.bak-<time>`; what is no run folder stays where it is.

    Returns:
        Its new name, or None if there was no run.

    Raises:
        UsageError: Another process trains it, and would go on in the folder of the new run.
    """
    if not (path / "config.yaml").exists():
        return None
    with ExitStack() as locks:
        for run in (path, path / "baseline"):
            if (run / "log.jsonl").exists():
                locks.enter_context(own_log(run / "log.jsonl"))
        moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        for number in range(1000):
            to = path.with_name(f"{path.name}.bak-{moment}" + (f"-{number}" if number else ""))
            if not to.exists():
                return path.rename(to)
        raise FileExistsError(f"{to} exists")
