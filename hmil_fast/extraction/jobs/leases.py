"""Leases: which process works on which slide, so that no two do the same one.

Only a saving: what makes a slide exist is the store's exclusive commit, with leases or without.

The lease of a slide is the file `leases/<slide>.<deaths>`, created exclusively. Its holder touches
it while it works; in an object store it writes it anew, if it is still the version that it read.
A lease that stood still for its time, or whose process is gone from this machine, is dead, and who
creates `<slide>.<deaths + 1>` succeeds it: of several takers one can. No clock of another machine
is read, and a taker that dies leaves a lease that dies like any other.
"""

import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
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
    """The leases that this process holds and those it sees others hold.

    Attributes:
        seconds: As given.
        pause: Seconds to wait before asking again for a slide that another process holds.

    Args:
        store: The feature store.
        seconds: A lease untouched for so long is dead.
        on_beat: Called every quarter of that time, by the thread that touches the leases.
    """

    def __init__(self, store: Location, seconds: float, on_beat: Callable[[], None]) -> None:
        self.folder = store / LEASES
        self._backend = backend_of(store)
        self._backend.make_folder(self.folder)
        self.seconds = seconds
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
        """Take the lease of a slide; None while it is held.

        Args:
            slide_id: The slide.
            fresh: Take it only if no process died on it yet.

        Raises:
            SlideError: As many processes as may have died while they worked on it.
        """
        if slide_id in self._held:
            return None
        name, since = slide_dirname(slide_id), time.time()
        text = json.dumps({"slide_id": slide_id, **self._me, "since": since}).encode()
        last: dict[str, Any] = {}
        for deaths in range(1 if fresh else MAX_DEATHS):
            path = self.folder / f"{name}.{deaths}"
            found = read_lease(path)
            if found is None:
                # held before it is there: a signal between the two would leave it behind
                lease = self._held[slide_id] = Lease(slide_id, path, deaths)
                if self._backend.create_exclusive(path, text, lasting=False):
                    # where its holder gave up in between, one who came later may be further
                    if not self._backend.exists(self.folder / f"{name}.{deaths + 1}"):
                        return lease
                    self.release(slide_id)
                    return None
                del self._held[slide_id]
                found = read_lease(path)
            if found is None or self._alive(path, *found):
                return None
            last = found[0]
        if fresh:
            return None
        where = f"the last one was process {last.get('pid')} on {last.get('host')}"
        raise SlideError(
            f"slide {slide_id!r}: {MAX_DEATHS} processes died while they worked on it, {where}",
            "look at it with `hmil-fast doctor`, give the job more memory or a smaller --batch; "
            "to have it tried again run the same command with --retry-failed",
        )

    def release(self, slide_id: str) -> None:
        """Give a lease back, with those of the dead before it."""
        lease = self._held.pop(slide_id, None)
        if lease is None:
            return
        for deaths in range(lease.deaths):
            self._backend.unlink(lease.path.with_name(f"{slide_dirname(slide_id)}.{deaths}"))
        if self._is_ours(read_lease(lease.path)):
            self._backend.unlink(lease.path)

    def held(self) -> list[Lease]:
        """What this process holds."""
        return list(self._held.values())

    def close(self) -> None:
        """Give everything back."""
        self._closing.set()
        for slide_id in list(self._held):
            with suppress(OSError):  # it will be taken over
                self.release(slide_id)

    def _beat(self) -> None:
        while not self._closing.wait(self.seconds / 4):
            for lease in self.held():
                with suppress(OSError):
                    found = read_lease(lease.path)
                    if found is not None and self._is_ours(found):
                        beats = {"beats": int(found[0].get("beats", 0)) + 1}
                        text = json.dumps(found[0] | beats).encode()
                        self._backend.renew(lease.path, found[1], text)
            with suppress(OSError):
                self._on_beat()

    def _is_ours(self, found: tuple[dict[str, Any], Stamp] | None) -> bool:
        return found is not None and found[0].get("owner") == self._me["owner"]

    def _alive(self, path: Location, lease: dict[str, Any], stamp: Stamp) -> bool:
        if lease.get("machine") == self._me["machine"] and not runs(lease.get("pid")):
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
    """A lease's text and when it was touched; None where it is gone."""
    try:
        text, stamp = backend_of(path).read_stamped(path, _MAX_BYTES)
        found = json.loads(text)
    except (OSError, StoreError):
        return None
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}, stamp


def read_leases(store: Location) -> list[tuple[str, dict[str, Any], Stamp]]:
    """All leases, by name: those of the dead come first."""
    folder = store / LEASES
    names = sorted(name for name in backend_of(folder).stamps(folder) if not name.startswith("."))
    found = backend_of(store).map(lambda name: read_lease(folder / name), names)
    return [(name, *lease) for name, lease in zip(names, found, strict=True) if lease]


def outlived(store: Location, done: Iterable[str], older_than_s: float) -> list[Location]:
    """Leases on slides that are done, untouched for so many seconds: their holders died."""
    names = {slide_dirname(slide_id) for slide_id in done}
    return [
        store / LEASES / name
        for name, stamp in backend_of(store).stamps(store / LEASES).items()
        if name.rpartition(".")[0] in names and time.time() - stamp.time >= older_than_s
    ]


def held_by(store: Location, pid: int) -> list[str]:
    """Slides whose leases name a process of this host."""
    here = (socket.gethostname(), pid)
    return sorted(
        str(lease.get("slide_id"))
        for _, lease, _ in read_leases(store)
        if (lease.get("host"), lease.get("pid")) == here
    )


def machine() -> str:
    """This kernel and its pid namespace, within which a pid means something; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"unknown {uuid.uuid4().hex}"


def runs(pid: object) -> bool:
    """Whether this machine has such a process; True where the number is none."""
    if not isinstance(pid, int) or pid <= 0:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    try:  # one that is dead, but that nobody has waited for, as in a container without an init
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" Z")
    except OSError:
        return True
