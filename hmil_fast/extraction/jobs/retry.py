"""`hmil-fast extract --retry-failed`: slides that were given up are tried once more."""

import time
from collections.abc import Iterable

from hmil_fast.extraction.jobs.events import Failures
from hmil_fast.extraction.jobs.leases import LEASES, MAX_DEATHS, machine, read_lease, runs
from hmil_fast.io.store import slide_dirname
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.location import Location


def forget_deaths(store: Location, slide_ids: Iterable[str]) -> None:
    """Delete the leases of slides on which as many processes died as may, and that they failed.

    Unlike the takers of leases this goes by the clock: where it is wrong by minutes, two processes
    may do the same slide, of which one loses.

    Args:
        store: The store.
        slide_ids: Slides of the job.
    """
    failures = Failures(store)
    given_up = {name.rsplit(".", 1)[0] for name in backend_of(store).stamps(store / LEASES)}
    for slide_id in slide_ids:
        name = slide_dirname(slide_id)
        paths = [store / LEASES / f"{name}.{deaths}" for deaths in range(MAX_DEATHS)]
        last = read_lease(paths[-1]) if name in given_up else None
        if last is None:
            continue
        lease, stamp = last
        gone = lease.get("machine") == machine() and not runs(lease.get("pid"))
        seconds = lease.get("seconds")
        if gone or not isinstance(seconds, (int, float)) or time.time() - stamp.time > seconds:
            for path in reversed(paths):
                backend_of(path).unlink(path)
            failures.forget(slide_id)
