"""Run a job in worker processes on this machine; leases divide the slides among them."""

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType

import torch

from hmil_fast.device import pick_device
from hmil_fast.errors import HmilError, Stopped, StoreError
from hmil_fast.extraction.encoders import EncoderChoice
from hmil_fast.extraction.jobs.leases import held_by
from hmil_fast.extraction.jobs.messages import Message
from hmil_fast.extraction.jobs.summary import Collector
from hmil_fast.extraction.jobs.watchdog import worker_watchdog
from hmil_fast.extraction.jobs.worklist import work
from hmil_fast.extraction.pipeline.extractor import Extractor
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.slide.base import cpus
from hmil_fast.io.store import open_store
from hmil_fast.io.store.location import Location
from hmil_fast.io.tiles.grid import TileSpec

_DRAIN_SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """A job as it is sent to its workers."""

    store: Location
    tasks: Sequence[SlideTask]
    encoder: EncoderChoice
    spec: TileSpec
    batch: int | None
    threads: int | None
    lease_seconds: float
    slide_timeout: float


def run_workers(job: Job, devices: Sequence[str], collector: Collector) -> None:
    """Run a job in worker processes, one a device; a worker that dies is replaced.

    A slide on which several workers died is abandoned by its leases, so deaths come to an end.

    Args:
        job: The job.
        devices: A device each; one may come twice.
        collector: Takes the messages of the workers.
    """
    running: dict[Connection, tuple[SpawnProcess, str]] = {}
    try:
        for device in devices:
            _start(job, device, len(devices), running)
        while running:
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    process, device = running.pop(pipe)
                    pipe.close()
                    process.join()
                    if process.exitcode and _report_death(job, process, collector):
                        _start(job, device, len(devices), running)
                    continue
                if isinstance(message, HmilError):
                    collector.note(f"a worker ended: {message}", "bad")
                else:
                    collector(message)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join(_DRAIN_SECONDS)
            process.kill()


def _start(
    job: Job, device: str, workers: int, running: dict[Connection, tuple[SpawnProcess, str]]
) -> None:
    spawn = get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_worker, args=(job, device, workers, sender), daemon=True)
    # Ctrl-C reaches the whole group; workers inherit the mask, so that only we stop them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    sender.close()
    running[receiver] = process, device


def _report_death(job: Job, process: SpawnProcess, collector: Collector) -> bool:
    """Report that a worker died; return whether to start another one."""
    code = process.exitcode or 0
    if code == -signal.SIGALRM:
        how = f"was ended, no tile was done for {job.slide_timeout / 60:g} minutes"
    else:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    slides = held_by(job.store, process.pid or 0)
    at = f" while it worked on {', '.join(slides)}" if slides else ""
    collector.note(f"worker {process.pid} {how}{at}")
    return bool(slides)


def _worker(job: Job, device: str, workers: int, pipe: Connection) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: it cleans up, unless a thread hangs
        signal.setitimer(signal.ITIMER_REAL, _DRAIN_SECONDS / 2)
        raise Stopped(number)

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def emit(message: Message | HmilError) -> None:
        try:
            pipe.send(message)
        except OSError:  # the parent has gone
            raise Stopped(signal.SIGTERM) from None

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cpus() // workers))
    threads = job.threads or max(2, min(16, cpus() // workers))
    try:
        store = open_store(job.store)
        encoder = job.encoder.load(pick_device(device))
        extractor = Extractor(store, encoder, job.spec, batch=job.batch, threads=threads)
        work(extractor, job.tasks, job.lease_seconds, emit, worker_watchdog(job.slide_timeout))
    except HmilError as error:
        emit(error)
    except OSError as error:
        emit(StoreError(str(error), "check the disk of the store, then run the same command again"))
    except Stopped as stopped:
        raise SystemExit(stopped.exit_code) from None


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
