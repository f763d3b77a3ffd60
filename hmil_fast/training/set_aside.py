"""A run folder makes way for another; nothing is deleted."""

import time
from pathlib import Path


def set_aside(path: Path) -> Path | None:
    """Rename a run folder to `<path>.bak-<time>`; what is no run folder stays where it is.

    Returns:
        Its new name, or None if there was no run.
    """
    if not (path / "config.yaml").exists():
        return None
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    for number in range(1000):
        to = path.with_name(f"{path.name}.bak-{moment}" + (f"-{number}" if number else ""))
        if not to.exists():
            return path.rename(to)
    raise FileExistsError(f"{to} exists")
