"""Run a job on the workers of a dask cluster, one loop over slides in each."""

import logging
import queue
import signal
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hmil_fast import __version__
from hmil_fast.errors import UsageError
from hmil_fast.extraction.engines.local import Job
from hmil_fast.extraction.jobs.summary import Collector
from hmil_fast.io.slide.base import cpus

CONNECT_SECONDS = 10.0
_LOOK_EVERY = 0.5
_DRAIN_SECONDS = 60.0
_GRACE_SECONDS = 10.0  # for the other loops, once one has seen that all slides are settled
_ALONE_SECONDS = 900.0  # without a worker
_STILLBORN = 3  # workers that may die before they have loaded the encoder, for each there is


def run_on_dask(
    job: Job, devices: Sequence[str], scheduler: str | None, collector: Collector
) -> None:
    """Run a job on the workers of a dask cluster, also on those that join later.

    Args:
        job: The job; its paths must mean the same on all hosts.
        devices: Without a scheduler, a worker on this machine each; else one, for all workers.
        scheduler: Address or scheduler file of a running cluster; None starts one on loopback.
        collector: Takes the messages of the workers.

    Raises:
        UsageError: No scheduler answers.
    """
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        job = _everywhere(job)
        with _no_ctrl_c():  # neither for its threads nor for its workers: only we stop them
            client = _connect(devices, scheduler, collector, stack)
        loops = _Loops(client, job, devices, collector)
        stack.callback(loops.stop)
        loops.run()


def check_cluster(scheduler: str | None) -> None:
    """Check that dask is installed and that the scheduler file exists.

    Raises:
        UsageError: One of them is missing.
    """
    try:
        from distributed import Client  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--engine dask needs dask.distributed ({error})",
            'run pip install "hmil-fast[cluster]"',
        ) from None
    if scheduler is None or Path(scheduler).is_file() or "://" in scheduler:
        return
    if "/" in scheduler or scheduler.endswith(".json"):
        raise UsageError(f"the scheduler file {scheduler} does not exist", _START)


class _Loops:
    """The loops of a job, one in each worker that is there."""

    def __init__(self, client: Any, job: Job, devices: Sequence[str], collector: Collector) -> None:
        self._client, self._job, self._devices, self._collector = client, job, devices, collector
        self._topic = f"hmil-fast-{uuid.uuid4().hex}"
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._futures: dict[str, Any] = {}  # by address, also those that have ended
        self._running: dict[int, str] = {}  # address by number, until its last message
        self._started: set[int] = set()
        self._count = self._stillborn = 0
        self._settled_at: float | None = None
        client.subscribe_topic(self._topic, lambda event: self._inbox.put(event[1]))

    def run(self) -> None:
        """Start loops and pass on what they say, until all slides are done or failed."""
        alone_since: float | None = time.monotonic()
        told = False
        while True:
            self._listen(_LOOK_EVERY)
            now = time.monotonic()
            if self._settled_at is not None:
                if not self._running or now - self._settled_at > _GRACE_SECONDS:
                    return
                continue
            workers = self._workers()
            if workers is None:
                self._collector.note("the dask scheduler is gone, and with it its workers", "bad")
                self._running.clear()
                return
            self._update(workers)
            if workers and not self._running:
                self._listen(1.0)  # what was said last may still be on its way
                if self._settled_at is None:
                    self._collector.note("no worker of the cluster can go on", "bad")
                return
            if workers:
                alone_since = None
                continue
            alone_since = alone_since or now
            if not told and now - alone_since > CONNECT_SECONDS:
                self._collector.note("the cluster has no worker: start some, the job waits")
                told = True
            if now - alone_since > _ALONE_SECONDS:
                return

    def stop(self) -> None:
        """Have all loops end: each drops its slide and gives its leases back."""
        until = time.monotonic() + (_GRACE_SECONDS if self._settled_at else _DRAIN_SECONDS)
        with suppress(Exception):  # the scheduler may be gone
            self._client.cancel([self._futures[a] for a in self._running.values()], force=True)
        while self._running and time.monotonic() < until and self._settled_at is None:
            self._listen(_LOOK_EVERY)
            workers = self._workers()
            gone = [n for n, address in self._running.items() if address not in (workers or ())]
            for number in gone:
                del self._running[number]

    def _workers(self) -> set[str] | None:
        """Addresses of the workers; None when the scheduler is gone."""
        if self._client.status not in ("running", "connecting"):
            return None
        try:
            return set(self._client.nthreads())
        except Exception:  # noqa: BLE001  # a dozen kinds, all say that nobody answers
            return None

    def _update(self, workers: set[str]) -> None:
        for number, address in list(self._running.items()):
            future = self._futures[address]
            if address not in workers:
                del self._running[number]
                self._stillborn += number not in self._started
                self._client.cancel([future], force=True)
                self._collector.note(f"worker {address} is gone")
            elif future.status == "error":
                del self._running[number]
                why = str(future.exception()).split("\n", 1)[0] or type(future.exception()).__name__
                self._note_problem(
                    address,
                    f"it cannot run the job: {why}",
                    "install the same hmil-fast, dask and Python on all hosts",
                )
        if self._stillborn > _STILLBORN * max(1, len(workers)):
            raise UsageError(
                f"{self._stillborn} dask workers died while they loaded the encoder",
                "look at their logs; give them more memory",
            )
        for address in workers - self._futures.keys():
            self._count += 1
            self._futures[address] = self._client.submit(
                _run_loop,
                self._job,
                self._devices,
                self._topic,
                self._count,
                __version__,
                key=f"{self._topic}-{self._count}",
                workers=[address],
                pure=False,
            )
            self._running[self._count] = address

    def _listen(self, seconds: float) -> None:
        """Take messages for so long."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                facts = self._inbox.get(timeout=left)
            except queue.Empty:
                return
            self._hear(facts)

    def _hear(self, facts: dict[str, Any]) -> None:
        from hmil_fast.extraction.engines.dask_worker import unpack

        number = facts["loop"]
        message = unpack(facts)
        if message is not None:
            self._collector(message)
        elif "started" in facts:
            self._started.add(number)
        elif "settled" in facts:
            self._settled_at = self._settled_at or time.monotonic()
        elif "problem" in facts:
            self._note_problem(self._running.get(number, "?"), *facts["problem"])
        elif "ended" in facts:
            self._running.pop(number, None)

    def _note_problem(self, address: str, what: str, fix: str) -> None:
        text = f"worker {address} ended: {what}. Fix: {fix}"
        self._collector.note(text, "bad")


def _everywhere(job: Job) -> Job:
    """The job with absolute paths: a worker has its own working directory."""
    weights = job.encoder.weights
    return replace(
        job,
        store=job.store.absolute() if isinstance(job.store, Path) else job.store,
        tasks=[replace(task, path=task.path.absolute()) for task in job.tasks],
        encoder=replace(job.encoder, weights=weights and weights.absolute()),
    )


def _run_loop(*args: Any) -> None:
    from hmil_fast.extraction.engines.dask_worker import run_loop

    run_loop(*args)


def _entered(stack: ExitStack, resource: Any) -> Any:
    """The resource, left with the stack; one that does not close in time fails no finished job."""

    def leave(*error: Any) -> None:
        with suppress(TimeoutError):
            resource.__exit__(*error)

    stack.push(leave)
    return resource.__enter__()


def _connect(
    devices: Sequence[str], scheduler: str | None, collector: Collector, stack: ExitStack
) -> Any:
    from distributed import Client, LocalCluster

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if scheduler is None:
            cluster = _entered(
                stack,
                LocalCluster(
                    n_workers=len(devices),
                    threads_per_worker=max(1, cpus() // len(devices)),
                    processes=True,
                    host="127.0.0.1",
                    dashboard_address=None,
                    memory_limit=0,  # what is too much the system says; dask would pause a worker
                    silence_logs=logging.CRITICAL,
                ),
            )
            where: dict[str, Any] = {"address": cluster}
        elif Path(scheduler).is_file():
            where = {"scheduler_file": scheduler}
        else:
            where = {"address": scheduler}
        try:
            client = Client(**where, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            why = str(error).split("\n", 1)[0]
            raise UsageError(f"no dask scheduler at {scheduler}: {why}", _START) from None
        _entered(stack, client)
    for warning in caught:
        if "Mismatched versions" in str(warning.message):
            lines = [line for line in str(warning.message).split("\n") if line.startswith("| ")]
            names = ", ".join(line.split("|")[1].strip() for line in lines[1:])
            collector.note(f"other versions on the cluster than here: {names}")
    return client


_START = (
    "start one with `dask scheduler --host ADDRESS` and workers with `dask worker ADDRESS:8786` "
    "(see docs/cluster.md)"
)


@contextmanager
def _no_ctrl_c() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
