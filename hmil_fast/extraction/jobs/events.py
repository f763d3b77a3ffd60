"""Write what jobs record in the store: event logs, failures, lists of slides."""

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterable
from typing import Any

from hmil_fast.errors import HmilError, StoreError
from hmil_fast.extraction.jobs.leases import machine, reset_deaths
from hmil_fast.io.store import slide_dirname
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.location import Location
from hmil_fast.io.store.protocol import Stamp

EVENTS, FAILED, JOBS = "events", "failed", "jobs"
_MAX_BYTES = 64 * 2**20
_PIECE_BYTES = 2**17


class EventLog:
    """One process's events as JSON lines in `events/<host>-<pid>.jsonl`.

    Every line holds `time` (seconds since the epoch), `event`, and `tiles`, those encoded so far.
    "job start" and "beat" say who the process is, `pid` and `machine`, and after how long without a
    line it is dead, `silent_s`.
    Each process has its own file: appends by several machines to one file get mixed up. Objects
    cannot be appended to: there the file is written anew with every event, and followed by another
    one, `<host>-<pid>-1.jsonl`, when its last event is "continued".
    """

    def __init__(self, store: Location) -> None:
        self._name = f"{socket.gethostname()}-{os.getpid()}"
        self.path = store / EVENTS / f"{self._name}.jsonl"
        self._backend = backend_of(store)
        self._backend.make_folder(self.path.parent)
        self.tiles = 0
        self._machine = machine()
        self._lock = threading.Lock()
        self._piece, self._pieces = b"", 0

    def alive(self, event: str, silent_s: float, **facts: Any) -> None:
        """Append an event that also says who the process is."""
        self.write(event, silent_s=silent_s, pid=os.getpid(), machine=self._machine, **facts)

    def write(self, event: str, **facts: Any) -> None:
        """Append an event."""
        with self._lock:
            line = {"time": round(time.time(), 3), "event": event, "tiles": self.tiles, **facts}
            text = json.dumps(line).encode() + b"\n"
            if self._backend.append(self.path, text):
                return
            self._piece += text
            full = len(self._piece) > _PIECE_BYTES
            if full:
                self._piece += json.dumps({**line, "event": "continued"}).encode() + b"\n"
            self._backend.replace(self.path, self._piece)
            if full:
                self._piece, self._pieces = b"", self._pieces + 1
                self.path = self.path.with_name(f"{self._name}-{self._pieces}.jsonl")


def read_json(path: Location) -> tuple[Any, Stamp] | None:
    """A small JSON file and its stamp; None where it is gone or no JSON."""
    try:
        text, stamp = backend_of(path).read_stamped(path, _MAX_BYTES)
        return json.loads(text), stamp
    except (OSError, StoreError, ValueError):
        return None


class Failures:
    """The latest failure of each slide, `failed/<slide>.json`, so that one job tries it once."""

    def __init__(self, store: Location) -> None:
        self.folder = store / FAILED
        self._backend = backend_of(store)
        self._backend.make_folder(self.folder)
        self._old = {name: stamp.tag for name, stamp in self._backend.stamps(self.folder).items()}

    def record(self, slide_id: str, error: HmilError) -> None:
        """Say why a slide failed."""
        facts = {"slide_id": slide_id, "error": error.what, "fix": error.fix, "time": time.time()}
        self._backend.replace(self._path(slide_id), json.dumps(facts).encode())

    def forget(self, slide_id: str) -> None:
        """The slide is in the store after all."""
        self._backend.unlink(self._path(slide_id))

    def since_start(self, slide_id: str) -> HmilError | None:
        """Why a slide failed elsewhere while this job runs."""
        path = self._path(slide_id)
        found = read_json(path)
        if found is None or self._old.get(path.name) == found[1].tag:
            return None
        facts = found[0] if isinstance(found[0], dict) else {}
        return HmilError(str(facts.get("error")), str(facts.get("fix")))

    def _path(self, slide_id: str) -> Location:
        return self.folder / f"{slide_dirname(slide_id)}.json"


def retry_abandoned(store: Location, slide_ids: Iterable[str]) -> None:
    """Let slides be tried again that were abandoned after repeated crashes of their processes."""
    failures = Failures(store)
    for slide_id in reset_deaths(store, slide_ids):
        failures.forget(slide_id)


def save_job(store: Location, slide_ids: Iterable[str]) -> None:
    """Keep what a job is to extract, once for all its processes; the newest list is what runs."""
    text = json.dumps(sorted(slide_ids)).encode()
    path = store / JOBS / f"{hashlib.sha256(text).hexdigest()[:16]}.json"
    backend_of(path.parent).make_folder(path.parent)
    backend_of(path).replace(path, text)
