"""Extract features of slides into a store."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hmil_fast.device import pick_device
from hmil_fast.errors import UsageError
from hmil_fast.extraction.decode_choice import chosen_codecs
from hmil_fast.extraction.encoders import DEFAULT_ENCODER, Encoder, EncoderChoice
from hmil_fast.extraction.engines.dask_cluster import check_cluster, run_on_dask
from hmil_fast.extraction.engines.local import Job, run_workers
from hmil_fast.extraction.jobs.events import retry_abandoned
from hmil_fast.extraction.jobs.messages import Hanging, Notice, Report, no_report
from hmil_fast.extraction.jobs.status import read_status
from hmil_fast.extraction.jobs.summary import Collector, JobSummary
from hmil_fast.extraction.jobs.watchdog import thread_watchdog
from hmil_fast.extraction.jobs.worklist import LEASE_SECONDS, in_order, work
from hmil_fast.extraction.pipeline.extractor import Extractor, gpu_decoder, store_spec
from hmil_fast.extraction.preflight import preflight
from hmil_fast.extraction.slides import SlideTask, collect_slides
from hmil_fast.io.store import StoreSpec, create_store, open_store
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.layout import STORE_FILE
from hmil_fast.io.store.location import Location, location
from hmil_fast.io.tiles.grid import TileSpec


@dataclass(frozen=True)
class JobOptions:
    """How an extraction job runs; none of it changes the features.

    Attributes:
        device: "auto", "cpu" or "cuda[:i]".
        workers: Worker processes; by default one a GPU, and without a GPU this process alone.
        engine: "local", or "dask".
        scheduler: Address or scheduler file of a running dask cluster; None starts one here.
        shard: (i, n) with 1 ≤ i ≤ n: extract the i-th of n parts first, then help with the others.
        batch_size: Tiles of a forward pass; by default as many as the memory takes.
        threads: Threads that decode; by default by the number of cores.
        lease_seconds: Seconds without a heartbeat before another process takes over a slide.
        hang_minutes: Minutes without a tile after which a worker is ended, or `Hanging` reported.
        retry_failed: Retry slides that were abandoned after repeated worker crashes.
        preflight: Estimate tiles, bytes and time first, and refuse a disk that is too small.
    """

    device: str = "auto"
    workers: int | None = None
    engine: str = "local"
    scheduler: str | None = None
    shard: tuple[int, int] | None = None
    batch_size: int | None = None
    threads: int | None = None
    lease_seconds: float = LEASE_SECONDS
    hang_minutes: float = 30.0
    retry_failed: bool = False
    preflight: bool = True


def extract(
    slides: Sequence[SlideTask | Path | str] | Path | str,
    store: Location | str,
    tiles: TileSpec = TileSpec(),
    encoder: EncoderChoice | str = DEFAULT_ENCODER,
    *,
    dtype: str = "float16",
    decode: str = "auto",
    options: JobOptions = JobOptions(),
    report: Report = no_report,
) -> JobSummary:
    """Extract slides into a store, which is made if it does not exist; called again, it resumes.

    A slide that cannot be extracted stops no other; its error is in the summary.

    Args:
        slides: Slide files, folders or globs, or what `collect_slides` returns.
        store: Folder or URL of the store.
        tiles: Size in px, scale in µm/px and views of the tiles, and the least share of tissue.
        encoder: The encoder, or the name of one.
        dtype: dtype of the stored features, "float16" or "float32".
        decode: What decodes the slides, fixed when the store is made: "cpu"; "gpu", JPEG and JPEG
            2000 tiles, straight into its memory; "auto", as the store says, and for a new one what
            keeps the encoder busy.
        options: Device, workers and the like.
        report: Called with every event of the job, see `hmil_fast.extraction.jobs.messages`.

    Raises:
        UsageError: No slides, or a wrong encoder, device or option.
        StoreError: The store was made with another encoder or other tiles, or the disk is too
            small.
        Stopped: Ctrl-C or SIGTERM; the same call resumes.

    Example:
        >>> import hmil_fast
        >>> summary = hmil_fast.extract("slides", "features")
        >>> [result.slide_id for result in summary.failed]
        []
    """
    if options.scheduler is not None and options.engine != "dask":
        raise UsageError("--scheduler is given without --engine dask", "give both")
    if options.engine == "dask":
        check_cluster(options.scheduler)
    tasks = slide_tasks(slides, report)
    path = location(store)
    backend_of(path).check(path, writing=False)
    devices = _devices(options.device, options.workers)
    # a GPU is worth a process of its own, which is replaced when a slide kills or hangs it
    local = options.engine == "local"
    in_process = local and options.workers is None and not devices[0].startswith("cuda")
    choice = EncoderChoice(encoder) if isinstance(encoder, str) else encoder
    # where workers do the job it is loaded here only for its card and its hash
    loaded = choice.load(pick_device(options.device if in_process else "cpu"))
    if not any(task.path.exists() for task in tasks):  # before a store is made with these tiles
        raise UsageError(f"{tasks[0].path} does not exist", "check the path")
    if options.preflight:
        timed = loaded if local and not devices[0].startswith("cuda") else None
        features = (loaded.card.dim, dtype)
        if (text := preflight(tasks, _done(path), tiles, features, timed, path)) is not None:
            report(Notice(f"to do: {text}", "info"))
    gpu_decoded = chosen_codecs(decode, tasks, loaded, devices, _stored_decoding(path))
    tiles = replace(tiles, gpu_decoded=gpu_decoded)
    if gpu_decoded and local and not devices[0].startswith("cuda"):
        gpu_decoder(loaded.device)  # refuses, before a store is made that nothing here can fill
    wanted = store_spec(loaded, tiles, dtype)
    _forget_unused(path, wanted)
    opened = create_store(path, wanted)
    tasks = in_order(tasks, options.shard)
    if options.retry_failed:
        retry_abandoned(opened.path, [task.slide_id for task in tasks])
    _warn_of_mpp(loaded, tiles.scales, report)
    collector = Collector(opened, tasks, report)
    if in_process:
        size, threads = options.batch_size, options.threads
        extractor = Extractor(opened, loaded, tiles, batch=size, threads=threads)
        minutes = options.hang_minutes
        watchdog = thread_watchdog(60 * minutes, lambda: report(Hanging(minutes)))
        work(extractor, collector.todo, options.lease_seconds, collector, watchdog)
        return collector.summary(1)
    job = Job(
        opened.path,
        collector.todo,
        choice,
        tiles,
        options.batch_size,
        options.threads,
        options.lease_seconds,
        60 * options.hang_minutes,
    )
    devices = devices[: len(collector.todo)]
    if local or not collector.todo:
        run_workers(job, devices, collector)
    else:
        there = [options.device] if options.scheduler else devices
        run_on_dask(job, there, options.scheduler, collector)
    return collector.summary(len(devices))


def slide_tasks(
    slides: Sequence[SlideTask | Path | str] | Path | str, report: Report = no_report
) -> list[SlideTask]:
    """Return slide tasks as they are, and collect the slides of files, folders and globs.

    Raises:
        UsageError: No slides, or two with one id.
    """
    given = [slides] if isinstance(slides, Path | str) else list(slides)
    tasks = [each for each in given if isinstance(each, SlideTask)]
    names = [str(each) for each in given if not isinstance(each, SlideTask)]
    if not tasks:
        return collect_slides(names, tell=lambda text: report(Notice(text)))
    if names:
        raise UsageError("slides are both tasks and paths", "give one kind")
    return tasks


def _forget_unused(path: Location, wanted: StoreSpec) -> None:
    """Let other settings into a store without a slide, as a refused first try leaves it."""
    if not backend_of(path).exists(path / STORE_FILE) or open_store(path).spec == wanted:
        return
    now = read_status(path)
    if not (now["committed"] or now["in_work"] or now["processes"]):
        backend_of(path).unlink(path / STORE_FILE)


def _stored_decoding(store: Location) -> list[str] | None:
    """The codecs that a GPU decodes by what the store says; None where there is no store."""
    if not backend_of(store).exists(store / STORE_FILE):
        return None
    return list(open_store(store).spec.tiling.get("gpu_decoded", []))


def _done(store: Location) -> set[str]:
    there = backend_of(store).exists(store / STORE_FILE)
    return set(open_store(store).slide_ids()) if there else set()


def _devices(device: str, workers: int | None) -> list[str]:
    """List the device of each worker: by default one worker a GPU, or one."""
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if not gpus:
        return [device] * (workers or 1)
    return [f"cuda:{i % gpus}" for i in range(workers or gpus)]


def _warn_of_mpp(encoder: Encoder, scales: Sequence[float], report: Report) -> None:
    card = encoder.card
    odd = [mpp for mpp in scales if not any(abs(mpp / stated - 1) < 0.1 for stated in card.mpp)]
    if card.mpp and odd:
        stated, wanted = (", ".join(map(str, values)) for values in (card.mpp, odd))
        report(Notice(f"{card.name} was made for {stated} µm/px, you ask for {wanted}"))
