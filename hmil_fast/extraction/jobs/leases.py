"""Lock slides by lease files, so that no two processes extract the same slide.

Leases only save work: a slide exists once the store's exclusive commit has succeeded, with a lease
or without.

The lease of a slide is the file `leases/<slide>.<deaths>`, created exclusively. Its holder touches
it while it works; in an object store it rewrites it, on condition that nobody else did. A lease is
dead when it was not touched for its time, or when its process is gone from this machine. Whoever
creates `<slide>.<deaths + 1>` then holds the slide; of several processes one succeeds. The clocks
of two machines are never compared. A holder that dies leaves a lease that expires like any other.
"""

import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmil_fast.errors import SlideError, StoreError
from hmil_fast.io.store import slide_dirname
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.location import Location
from hmil_fast.io.store.protocol import Stamp

LEASES = "leases"
MAX_DEATHS = 3
_MAX_BYTES = 2**16


@dataclass(frozen=True)
class Lease:
    """The right to work on a slide; `deaths` processes died on it before."""

    slide_id: str
    path: Location
    deaths: int


class Leases:
    """The leases that this process holds, and a watch on those of other processes.

    Attributes:
        seconds: As given.
        pause: Seconds to wait before the next try for a slide that another process holds.

    Args:
        store: The feature store.
        seconds: A lease that was not touched for this long is dead.
        on_beat: Called every quarter of that time, by the thread that touches the leases.
    """

    def __init__(self, store: Location, seconds: float, on_beat: Callable[[], None]) -> None:
        self.folder = store / LEASES
        self._backend = backend_of(store)
        self._backend.make_folder(self.folder)
        self.seconds = seconds
        # many processes may wait for a job's last slides and must not flood a server
        self.pause = min(self._backend.poll_s, seconds / 4)
        self._on_beat = on_beat
        self._me = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        self._me |= {"machine": machine(), "seconds": seconds}
        self._held: dict[str, Lease] = {}
        self._seen: dict[Location, tuple[int | str, float]] = {}
        self._closing = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="leases", daemon=True)
        self._heart.start()

    def take(self, slide_id: str, *, fresh: bool = False) -> Lease | None:
        """Take the lease of a slide; None while another process holds it.

        Args:
            slide_id: The slide.
            fresh: Take it only if no process died on it yet.

        Raises:
            SlideError: `MAX_DEATHS` processes died while they worked on it.
        """
        if slide_id in self._held:
            return None
        name, since = slide_dirname(slide_id), time.time()
        text = json.dumps({"slide_id": slide_id, **self._me, "since": since}).encode()
        last: dict[str, Any] = {}
        for deaths in range(1 if fresh else MAX_DEATHS):
            path = self.folder / f"{name}.{deaths}"
            existing = read_lease(path)
            if existing is None:
                # listed before it exists: a signal between the two would leave the file behind
                lease = self._held[slide_id] = Lease(slide_id, path, deaths)
                if self._backend.create_exclusive(path, text, lasting=False):
                    # if its holder released it in between, another process may hold the next one
                    if not self._backend.exists(self.folder / f"{name}.{deaths + 1}"):
                        return lease
                    self.release(slide_id)
                    return None
                del self._held[slide_id]
                existing = read_lease(path)
            if existing is None or self._alive(path, *existing):
                return None
            last = existing[0]
        if fresh:
            return None
        where = f"the last one was process {last.get('pid')} on {last.get('host')}"
        raise SlideError(
            f"slide {slide_id!r}: {MAX_DEATHS} processes died while they worked on it, {where}",
            "check it with `hmil-fast doctor`; give the job more memory or a smaller --batch-size; "
            "to try it again run the same command with --retry-failed",
        )

    def release(self, slide_id: str) -> None:
        """Release a lease, and delete those of the dead processes before it."""
        lease = self._held.pop(slide_id, None)
        if lease is None:
            return
        for deaths in range(lease.deaths):
            self._backend.unlink(lease.path.with_name(f"{slide_dirname(slide_id)}.{deaths}"))
        if self._is_own(read_lease(lease.path)):
            self._backend.unlink(lease.path)

    def held(self) -> list[Lease]:
        """The leases that this process holds."""
        return list(self._held.values())

    def close(self) -> None:
        """Release all leases."""
        self._closing.set()
        for slide_id in list(self._held):
            with suppress(OSError):  # another process takes it over
                self.release(slide_id)

    def _beat(self) -> None:
        while not self._closing.wait(self.seconds / 4):
            for lease in self.held():
                with suppress(OSError):
                    existing = read_lease(lease.path)
                    if existing is not None and self._is_own(existing):
                        facts, stamp = existing
                        beats = {"beats": int(facts.get("beats", 0)) + 1}
                        self._backend.renew(lease.path, stamp, json.dumps(facts | beats).encode())
            with suppress(OSError):
                self._on_beat()

    def _is_own(self, lease: tuple[dict[str, Any], Stamp] | None) -> bool:
        return lease is not None and lease[0].get("owner") == self._me["owner"]

    def _alive(self, path: Location, lease: dict[str, Any], stamp: Stamp) -> bool:
        if is_gone(lease):
            return False
        stated = lease.get("seconds")
        seconds = self.seconds
        if isinstance(stated, (int, float)) and math.isfinite(stated):
            seconds = stated
        now = time.monotonic()
        before, since = self._seen.get(path, ("", 0.0))
        if before != stamp.tag:
            self._seen[path] = (stamp.tag, now)
            return True
        return now - since < seconds


def read_lease(path: Location) -> tuple[dict[str, Any], Stamp] | None:
    """The facts in a lease, empty if it is damaged, and its stamp; None if it does not exist."""
    try:
        text, stamp = backend_of(path).read_stamped(path, _MAX_BYTES)
        facts = json.loads(text)
    except (OSError, StoreError):
        return None
    except ValueError:
        facts = {}
    return facts if isinstance(facts, dict) else {}, stamp


def read_leases(store: Location) -> list[tuple[str, dict[str, Any], Stamp]]:
    """Name, facts and stamp of all leases, by name: those of dead processes come first."""
    folder = store / LEASES
    names = sorted(name for name in backend_of(folder).stamps(folder) if not name.startswith("."))
    leases = backend_of(store).map(lambda name: read_lease(folder / name), names)
    return [(name, *lease) for name, lease in zip(names, leases, strict=True) if lease]


def reset_deaths(store: Location, slide_ids: Iterable[str]) -> list[str]:
    """Delete the leases of slides that were abandoned after `MAX_DEATHS` deaths.

    Unlike `Leases.take` this compares the clocks of machines: if they differ by minutes, two
    processes may work on one slide, of which one commits.

    Returns:
        The slides whose leases were deleted.
    """
    backend = backend_of(store)
    names, reset = backend.stamps(store / LEASES), []
    for slide_id in slide_ids:
        name = slide_dirname(slide_id)
        paths = [store / LEASES / f"{name}.{deaths}" for deaths in range(MAX_DEATHS)]
        last = read_lease(paths[-1]) if paths[-1].name in names else None
        if last is None:
            continue
        lease, stamp = last
        seconds = lease.get("seconds")
        expired = not isinstance(seconds, (int, float)) or time.time() - stamp.time > seconds
        if expired or is_gone(lease):
            for path in reversed(paths):
                backend.unlink(path)
            reset.append(slide_id)
    return reset


def abandoned_leases(store: Location, done: Iterable[str], older_than_s: float) -> list[Location]:
    """Leases on slides in the store that were not touched for so long: their holders died."""
    names = {slide_dirname(slide_id) for slide_id in done}
    return [
        store / LEASES / name
        for name, stamp in backend_of(store).stamps(store / LEASES).items()
        if name.rpartition(".")[0] in names and time.time() - stamp.time >= older_than_s
    ]


def held_by(store: Location, pid: int) -> list[str]:
    """Slides whose leases a process of this host holds."""
    here = (socket.gethostname(), pid)
    return sorted(
        str(lease.get("slide_id"))
        for _, lease, _ in read_leases(store)
        if (lease.get("host"), lease.get("pid")) == here
    )


def machine() -> str:
    """An id of this kernel and its pid namespace, within which a pid is unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"unknown {uuid.uuid4().hex}"


def is_gone(facts: Mapping[str, Any]) -> bool:
    """Whether a lease or event names a process of this machine that does not run any more."""
    pid = facts.get("pid")
    if facts.get("machine") != machine() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    try:  # a zombie has ended too: in a container without an init nobody waits for it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" Z")
    except OSError:
        return False
