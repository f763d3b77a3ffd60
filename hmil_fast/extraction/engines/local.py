"""Worker processes on this machine, each with a warm encoder; leases share the slides out."""

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
from rich.markup import escape

from hmil_fast.device import pick_device
from hmil_fast.errors import HmilError, Stopped, StoreError
from hmil_fast.extraction.encoders import EncoderChoice
from hmil_fast.extraction.jobs.leases import held_by
from hmil_fast.extraction.jobs.summary import Report
from hmil_fast.extraction.jobs.watchdog import alarm
from hmil_fast.extraction.jobs.worklist import Message, work
from hmil_fast.extraction.pipeline.extractor import Extractor
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.slide.base import cpus
from hmil_fast.io.store import open_store
from hmil_fast.io.store.location import Location
from hmil_fast.io.tiles.grid import TileSpec

_DRAIN_SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """What every worker is to do, and how."""

    store: Location
    tasks: Sequence[SlideTask]
    encoder: EncoderChoice
    spec: TileSpec
    batch: int | None
    threads: int | None
    lease_seconds: float
    slide_timeout: float


def run_workers(job: Job, devices: Sequence[str], report: Report) -> None:
    """Do a job in processes of its own, one a device; one that dies is replaced.

    A slide on which too many died fails, by its leases; so deaths come to an end.

    Args:
        job: The job.
        devices: A device each; one may come twice.
        report: Told what happens.
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
                    if process.exitcode and _report_death(job, process, report):
                        _start(job, device, len(devices), running)
                    continue
                if isinstance(message, HmilError):
                    report.note(f"[red]a worker ended:[/] {escape(str(message))}")
                else:
                    report(message)
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
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_worker, args=(job, device, workers, theirs), daemon=True)
    # Ctrl-C reaches the whole group; workers inherit the mask, so that only we stop them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    running[ours] = process, device


def _report_death(job: Job, process: SpawnProcess, report: Report) -> bool:
    """Say that a worker died; whether it is worth starting another one."""
    code = process.exitcode or 0
    if code == -signal.SIGALRM:
        how = f"was ended, no tile was done for {job.slide_timeout / 60:g} minutes"
    else:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    slides = held_by(job.store, process.pid or 0)
    at = f" while it worked on {', '.join(slides)}" if slides else ""
    report.note(f"[yellow]worker {process.pid} {how}{escape(at)}")
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
        work(extractor, job.tasks, job.lease_seconds, emit, alarm(job.slide_timeout))
    except HmilError as error:
        emit(error)
    except OSError as error:
        emit(StoreError(str(error), "mend that, then run the same command again"))
    except Stopped as stopped:
        raise SystemExit(stopped.exit_code) from None


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
