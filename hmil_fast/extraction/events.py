"""What jobs leave in the store for people to follow: events, failures, lists of slides."""

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hmil_fast.errors import HmilError
from hmil_fast.io.store import slide_dirname
from hmil_fast.io.store.disk import create_exclusive

EVENTS, FAILED, JOBS = "events", "failed", "jobs"
_MAX_BYTES = 64 * 2**20


class EventLog:
    """One process's events as JSON lines in `events/<host>-<pid>.jsonl`.

    Every line holds `time` (seconds since the epoch), `event`, and `tiles`, those encoded so far.
    `silent_s`, of "job start" and "beat", says after how long without a line the process is dead.
    Each process has its own file: appends by several machines to one file get mixed up.
    """

    def __init__(self, store: Path) -> None:
        self.path = store / EVENTS / f"{socket.gethostname()}-{os.getpid()}.jsonl"
        self.path.parent.mkdir(exist_ok=True)
        self.tiles = 0
        self._lock = threading.Lock()

    def write(self, event: str, **facts: Any) -> None:
        """Append an event."""
        line = {"time": round(time.time(), 3), "event": event, "tiles": self.tiles, **facts}
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_json(path: Path) -> tuple[Any, int] | None:
    """A small JSON file and its time in ns; None where it is gone or no JSON."""
    try:
        with path.open("rb") as file:
            changed = os.fstat(file.fileno()).st_mtime_ns
            return json.loads(file.read(_MAX_BYTES)), changed
    except (OSError, ValueError):
        return None


class Failures:
    """The latest failure of each slide, `failed/<slide>.json`, so that one job tries it once."""

    def __init__(self, store: Path) -> None:
        self.folder = store / FAILED
        self.folder.mkdir(exist_ok=True)
        self._old = {path.name: path.stat().st_mtime_ns for path in self.folder.glob("*.json")}

    def record(self, slide_id: str, error: HmilError) -> None:
        """Say why a slide failed."""
        facts = {"slide_id": slide_id, "error": error.what, "fix": error.fix, "time": time.time()}
        path = self._path(slide_id)
        temporary = path.with_suffix(f".{socket.gethostname()}-{os.getpid()}.tmp")
        temporary.write_text(json.dumps(facts), encoding="utf-8")
        temporary.replace(path)

    def forget(self, slide_id: str) -> None:
        """The slide is in the store after all."""
        self._path(slide_id).unlink(missing_ok=True)

    def since_start(self, slide_id: str) -> HmilError | None:
        """Why a slide failed elsewhere while this job runs."""
        path = self._path(slide_id)
        found = read_json(path)
        if found is None or self._old.get(path.name) == found[1]:
            return None
        facts = found[0] if isinstance(found[0], dict) else {}
        return HmilError(str(facts.get("error")), str(facts.get("fix")))

    def _path(self, slide_id: str) -> Path:
        return self.folder / f"{slide_dirname(slide_id)}.json"


def save_job(store: Path, slide_ids: Iterable[str]) -> None:
    """Keep what a job is to extract, once for all its processes."""
    text = json.dumps(sorted(slide_ids)).encode()
    name = hashlib.sha256(text).hexdigest()[:16]
    path = store / JOBS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    if not create_exclusive(path, text):
        os.utime(path)  # the newest list is the one that runs
