"""`hmil-fast extract`: the job as a person sees it, with progress, summary and timings."""

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console

from hmil_fast.device import pick_device
from hmil_fast.errors import UsageError
from hmil_fast.extraction.doctor import print_slides, tile_spec
from hmil_fast.extraction.encoders import Encoder, EncoderChoice
from hmil_fast.extraction.engines.dask_cluster import check_cluster, run_on_dask
from hmil_fast.extraction.engines.local import Job, run_workers
from hmil_fast.extraction.jobs.retry import forget_deaths
from hmil_fast.extraction.jobs.status import read_status
from hmil_fast.extraction.jobs.summary import Report
from hmil_fast.extraction.jobs.watchdog import last_words
from hmil_fast.extraction.jobs.worklist import LEASE_SECONDS, in_order, work
from hmil_fast.extraction.pipeline.extractor import Extractor, store_spec
from hmil_fast.extraction.preflight import preflight
from hmil_fast.extraction.slides import SlideTask, collect_slides
from hmil_fast.io.store import StoreSpec, create_store, open_store
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.layout import STORE_FILE
from hmil_fast.io.store.location import Location


def extract(args: argparse.Namespace) -> int:
    """Extract slides into a store; returns the exit code.

    Raises:
        UsageError: Nothing to extract, or a wrong encoder, device or manifest.
        StoreError: The store was made with another encoder or other tiles.
    """
    if args.scheduler is not None and args.engine != "dask":
        raise UsageError("--scheduler is given without --engine dask", "give both")
    if args.engine == "dask":
        check_cluster(args.scheduler)

    def tell(text: str) -> None:
        err.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    err = Console(stderr=True)
    tasks = collect_slides(
        args.slides, args.manifest, args.slide_mpp, args.reader, args.glass, tell
    )
    if not args.dry_run:
        backend_of(args.store).check(args.store, writing=False)
    spec = tile_spec(args)
    devices = _devices(args.device, args.workers)
    # a GPU is worth a process of its own, which is replaced when a slide kills or hangs it
    local = args.engine == "local"
    in_process = local and args.workers is None and not devices[0].startswith("cuda")
    # with workers it is here only for what the store says of it
    here = args.device if in_process else "cpu"
    choice = EncoderChoice(args.encoder, args.weights, args.precision, args.compile)
    encoder = choice.load(pick_device(here))
    if args.dry_run:
        return print_slides(tasks, spec, encoder, args.store)
    if not any(task.path.exists() for task in tasks):  # before a store is made with these tiles
        raise UsageError(f"{tasks[0].path} does not exist", "check the path")
    if not args.no_preflight:
        cpu = local and not devices[0].startswith("cuda")
        done = _done(args.store)
        text = preflight(
            tasks, done, spec, (encoder.card.dim, args.dtype), encoder if cpu else None, args.store
        )
        if text is not None:
            err.print(f"to do: {text}", highlight=False, soft_wrap=True)
    wanted = store_spec(encoder, spec, args.dtype)
    _forget_unused(args.store, wanted)
    store = create_store(args.store, wanted)
    tasks = in_order(tasks, args.shard)
    if args.retry_failed:
        forget_deaths(store.path, [task.slide_id for task in tasks])
    if in_process:
        extractor = Extractor(store, encoder, spec, batch=args.batch, threads=args.threads)
        return run_job(tasks, extractor, args.lease_seconds, args.slide_timeout)
    _warn_of_mpp(err, encoder, spec.scales)
    report = Report(err, store, tasks)
    job = Job(
        store.path,
        report.todo,
        choice,
        spec,
        args.batch,
        args.threads,
        args.lease_seconds,
        60 * args.slide_timeout,
    )
    devices = devices[: len(report.todo)]
    with report:
        if local or not report.todo:
            run_workers(job, devices, report)
        else:
            there = [args.device] if args.scheduler else devices
            run_on_dask(job, there, args.scheduler, report)
    return report.print(len(devices))


def run_job(
    tasks: Sequence[SlideTask],
    extractor: Extractor,
    lease_seconds: float = LEASE_SECONDS,
    slide_minutes: float | None = None,
) -> int:
    """Extract what is not done yet, in this order, with progress and summary.

    Args:
        tasks: The slides.
        extractor: The warm encoder with its store.
        lease_seconds: After which the lease of a dead process ends.
        slide_minutes: Without a tile after which this process ends itself; None for never.

    Returns:
        The exit code: 0 when all slides are in the store.
    """
    err = Console(stderr=True)
    _warn_of_mpp(err, extractor.encoder, extractor.spec.scales)
    report = Report(err, extractor.store, tasks)
    with report:
        more = [] if slide_minutes is None else [last_words(slide_minutes)]
        work(extractor, report.todo, lease_seconds, report, *more)
    return report.print(1)


def _forget_unused(path: Location, wanted: StoreSpec) -> None:
    """Let other settings into a store without a slide, as a refused first try leaves it."""
    if not backend_of(path).exists(path / STORE_FILE) or open_store(path).spec == wanted:
        return
    now = read_status(path)
    if not (now["committed"] or now["in_work"] or now["processes"]):
        backend_of(path).unlink(path / STORE_FILE)


def _done(store: Location) -> set[str]:
    return (
        set(open_store(store).slide_ids())
        if backend_of(store).exists(store / STORE_FILE)
        else set()
    )


def _devices(device: str, workers: int | None) -> list[str]:
    """The device of each worker: by default one worker a GPU, or one."""
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if not gpus:
        return [device] * (workers or 1)
    return [f"cuda:{i % gpus}" for i in range(workers or gpus)]


def _warn_of_mpp(err: Console, encoder: Encoder, scales: Sequence[float]) -> None:
    card = encoder.card
    odd = [mpp for mpp in scales if not any(abs(mpp / stated - 1) < 0.1 for stated in card.mpp)]
    if card.mpp and odd:
        stated, asked = (", ".join(map(str, values)) for values in (card.mpp, odd))
        err.print(f"[yellow]{card.name} was made for {stated} µm/px, you ask for {asked}")
