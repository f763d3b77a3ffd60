"""The loop over a job's slides that runs in each dask worker, with its encoder loaded.

Leases divide the slides, not the scheduler: dask starts the loops and carries their messages.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from signal import SIGTERM
from typing import Any

import torch
from distributed import get_worker

from hmil_fast import __version__
from hmil_fast.device import pick_device
from hmil_fast.errors import HmilError, Stopped
from hmil_fast.extraction.engines.local import Job
from hmil_fast.extraction.jobs.messages import Elsewhere, Message, SearchDone, TilesDone
from hmil_fast.extraction.jobs.watchdog import worker_watchdog
from hmil_fast.extraction.jobs.worklist import work
from hmil_fast.extraction.pipeline.extractor import Extractor
from hmil_fast.extraction.pipeline.result import SlideResult
from hmil_fast.io.store import open_store

_SAY_EVERY = 1.0  # seconds between two messages on how far a slide is


def run_loop(job: Job, devices: Sequence[str], topic: str, number: int, version: str) -> None:
    """Do slides of a job until all are done or failed, or the job wants no more.

    Args:
        job: The job.
        devices: By the number that is the worker's name; the first one where that is none.
        topic: Where messages go.
        number: Of this loop; every message carries it.
        version: Of the command that started the job.
    """
    dask = get_worker()
    key, said = dask.get_current_task(), 0.0

    def tell(**facts: Any) -> None:
        dask.log_event(topic, {"loop": number, **facts})

    def emit(message: Message) -> None:
        nonlocal said
        task = dask.state.tasks.get(key)
        # cancelled: the command was stopped, or has died
        if task is None or task.state != "executing" or dask.status.name not in _AT_WORK:
            raise Stopped(SIGTERM)
        if isinstance(message, TilesDone):
            if time.monotonic() - said < _SAY_EVERY and message.done < message.total:
                return
            said = time.monotonic()
        if message:
            tell(**pack(message))

    try:
        if version != __version__:
            tell(problem=[f"it has hmil-fast {__version__}, this command is {version}", _SAME])
            return
        torch.set_num_threads(dask.state.nthreads)
        device = devices[dask.name] if isinstance(dask.name, int) else devices[0]
        threads = job.threads or max(2, min(16, dask.state.nthreads))
        store = open_store(job.store)
        encoder = job.encoder.load(pick_device(device))
        extractor = Extractor(store, encoder, job.spec, batch=job.batch, threads=threads)
        tell(started=True)
        work(extractor, job.tasks, job.lease_seconds, emit, worker_watchdog(job.slide_timeout))
        tell(settled=True)
    except HmilError as error:
        tell(problem=[error.what, error.fix])
    except OSError as error:
        tell(problem=[str(error), "check the disk of the store, then run the same command again"])
    except Stopped:
        pass
    finally:
        tell(ended=True)


_AT_WORK = ("running", "paused")
_SAME = "install the same hmil-fast on all hosts"


def pack(message: Message) -> dict[str, Any]:
    """A message as plain values."""
    if isinstance(message, TilesDone):
        return {"tiles": asdict(message)}
    if isinstance(message, SearchDone):
        return {"search": asdict(message)}
    if isinstance(message, Elsewhere):
        return {"elsewhere": message.slide_id}
    if isinstance(message, SlideResult):
        error = message.error and [message.error.what, message.error.fix]
        return {"result": asdict(message) | {"error": error}}
    return {"seconds": dict(message)}


def unpack(facts: dict[str, Any]) -> Message | None:
    """The message that `pack` was given; None where the loop speaks of itself."""
    if "tiles" in facts:
        return TilesDone(**facts["tiles"])
    if "search" in facts:
        return SearchDone(**facts["search"])
    if "elsewhere" in facts:
        return Elsewhere(facts["elsewhere"])
    if "result" in facts:
        error = facts["result"]["error"]
        return SlideResult(**facts["result"] | {"error": error and HmilError(*error)})
    return facts.get("seconds")
