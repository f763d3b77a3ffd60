"""Check this machine, and examine slides before extraction."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hmil_fast.errors import HmilError, StoreError
from hmil_fast.extraction.encoders import (
    DEFAULT_ENCODER,
    Encoder,
    encoder_names,
    first_line,
    plugins,
)
from hmil_fast.extraction.findings import Finding, decoder_findings, kernel_findings
from hmil_fast.extraction.preflight import (
    estimate,
    nbytes,
    require_space,
    sample,
    tile_bytes,
    tile_seconds,
)
from hmil_fast.extraction.prepare import each_tenth, prepare_slide
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.slide import Progress
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.location import Location
from hmil_fast.io.tiles.decode import decode_tiles
from hmil_fast.io.tiles.grid import TileSpec

PACKAGES = ("hmil-fast", "torch", "triton", "timm", "zarr", "numcodecs", "openslide-python")
PROBE_TILES = 32
# called with the slide and how many were examined before; then, on a large slide without small
# levels, with the share and px of the level that was searched for tissue
Watch = Callable[[str, int, float, int], None]


def _no_watch(slide_id: str, before: int, share: float, px: int) -> None:
    pass


@dataclass(frozen=True)
class SlideReport:
    """What an extraction would make of one slide; fields after `fix` are empty if `error` is set.

    Attributes:
        coarser: Level and effective mpp of further scales; `tiles` and what follows are of all.
        seconds: Expected time to decode and encode all tiles here; None where nobody can tell.
        bytes: Expected size of the features (float16) and coords in the store.
    """

    slide_id: str
    error: str | None = None
    fix: str | None = None
    reader: str = ""
    reader_reason: str = ""
    codec: str = ""
    size: tuple[int, int] = (0, 0)
    levels: int = 0
    mpp: float = 0.0
    mpp_source: str = ""
    level: int = 0
    mpp_effective: float = 0.0
    coarser: tuple[tuple[int, float], ...] = ()
    tiles: int = 0
    bytes: int = 0
    seconds: float | None = None
    note: str | None = None


def examine(
    tasks: Sequence[SlideTask],
    tiles: TileSpec,
    encoder: Encoder | None,
    store: Location | None = None,
    disk: Location | None = None,
    watch: Watch = _no_watch,
) -> tuple[list[Finding], list[SlideReport]]:
    """Examine slides before their extraction: open each, lay its grid, time a sample of tiles.

    Args:
        tasks: The slides.
        tiles: The tiles that would be extracted.
        encoder: The encoder; without one, times and sizes are left out.
        store: Where features would go: examine 16 of the slides, and estimate the whole job.
        disk: A place on the disk that features would go to; by default that of `store`, or of the
            working directory.
        watch: Called with progress, see `Watch`.
    """
    chosen = tasks if store is None else sample(tasks)
    slides, findings = slide_reports(chosen, tiles, encoder, store or disk or Path.cwd(), watch)
    if store is not None and encoder is not None:
        findings.append(_whole_job(tasks, slides, tiles, encoder, store))
    return findings, slides


def _whole_job(
    tasks: Sequence[SlideTask],
    slides: Sequence[SlideReport],
    spec: TileSpec,
    encoder: Encoder,
    store: Location,
) -> Finding:
    """What all slides need, by those that were looked at."""
    tiles = {slide.slide_id: None if slide.error else slide.tiles for slide in slides}
    seconds = sum(slide.seconds or 0 for slide in slides) / max(1, sum(s.tiles for s in slides))
    each = tile_bytes(spec, encoder.card.dim, "float16")
    expected = estimate(tasks, tiles, each, seconds)
    try:
        return Finding("ok", f"all slides: {expected}{require_space(expected, store)}")
    except StoreError as error:
        return Finding("bad", error.what, error.fix)


def machine_findings() -> list[Finding]:
    """Check hardware, versions, readers and encoders."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    findings = [
        Finding(
            "ok",
            f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
            f"{os.cpu_count()} cores ({torch.backends.cpu.get_cpu_capability()}), {memory:.0f} GiB",
        )
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            findings.append(
                Finding("ok", f"GPU {i}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {bf16}")
            )
    else:
        findings.append(
            Finding(
                "note",
                "no CUDA device: everything runs on the CPU in float32",
                "nothing, unless this machine has a GPU; then check `nvidia-smi` and its driver",
            )
        )
    findings.append(Finding("ok", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)))
    for what, names in (
        ("slide reader nvImageCodec", ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12")),
        ("slide reader cuCIM", ("cucim-cu13", "cucim-cu12")),
        ("tile pipelines DALI", ("nvidia-dali-cuda130", "nvidia-dali-cuda120")),
    ):
        installed = [name for name in names if _version(name) != "missing"]
        if installed:
            findings.append(Finding("ok", f"{what}: {installed[0]} {_version(installed[0])}"))
        else:
            text = 'pip install "hmil-fast[cu13]" (or [cu12]); until then the slower path serves'
            findings.append(Finding("note", f"{what} is not installed", text))
    findings += decoder_findings()
    findings += kernel_findings()
    findings.append(Finding("ok", f"slide reader OpenSlide {_openslide_version()}"))
    others = ", ".join(name for name in encoder_names() if name != DEFAULT_ENCODER)
    findings.append(Finding("ok", f"encoder with packaged weights: {DEFAULT_ENCODER}"))
    text = f"encoders with weights from the hub or --weights: {others}, and any timm model"
    findings.append(Finding("ok", text))
    cards, broken = plugins()
    if cards:
        text = ", ".join(card.name for card in cards)
        findings.append(Finding("ok", f"encoders of plugins: {text}"))
    findings += [Finding("note", error.what, error.fix) for error in broken]
    return findings


def slide_reports(
    tasks: Sequence[SlideTask],
    spec: TileSpec,
    encoder: Encoder | None,
    store: Location,
    watch: Watch = _no_watch,
) -> tuple[list[SlideReport], list[Finding]]:
    """Open every slide, lay its grid, and time a sample of tiles.

    Args:
        tasks: The slides.
        spec: The tiles asked for.
        encoder: The encoder; without one, times and sizes are left out.
        store: Where features would go; it need not exist.
        watch: Called with progress.
    """
    encode_s, dim = (None, 0) if encoder is None else (tile_seconds(encoder), encoder.card.dim)
    reports = []
    for number, task in enumerate(tasks):
        watch(task.slide_id, number, 0.0, 0)
        tenth = each_tenth(partial(watch, task.slide_id, number))
        reports.append(_report(task, spec, encode_s, dim, tenth))
    if encoder is None:
        return reports, []
    need = sum(report.bytes for report in reports)
    findings = [Finding("ok", f"features of these slides: {nbytes(need)} (float16)")]
    free = backend_of(store).free_bytes(store)
    if free is not None and need > free:
        fix = "free some, or give a --store on a larger disk"
        findings.append(Finding("bad", f"the disk of {store} has {nbytes(free)} free", fix))
    return reports, findings


def _report(
    task: SlideTask, spec: TileSpec, encode_s: float | None, dim: int, progress: Progress
) -> SlideReport:
    try:
        return _seen(task, spec, encode_s, dim, progress)
    except HmilError as error:
        return SlideReport(task.slide_id, error.what, error.fix)
    except Exception as error:  # noqa: BLE001  # the doctor looks at every slide
        what = f"slide {task.path} cannot be read ({first_line(error)})"
        fix = "try another --reader, or convert it to a tiled pyramidal TIFF (JPEG, RGB)"
        return SlideReport(task.slide_id, what, fix)


def _seen(
    task: SlideTask, spec: TileSpec, encode_s: float | None, dim: int, progress: Progress
) -> SlideReport:
    ready = prepare_slide(task, spec, progress)
    with ready.reader:
        info, grid = ready.reader.info, ready.grid
        n, every = len(grid.coords), sum(len(scale.coords) for scale in ready.grids)
        decode_s = 0.0
        if n:
            middle = max(0, n // 2 - PROBE_TILES // 2)
            start, bad = time.perf_counter(), 0
            sample = slice(middle, min(n, middle + PROBE_TILES))
            for batch in decode_tiles(
                ready.reader, grid, batch=PROBE_TILES, threads=1, rows=sample
            ):
                bad += int(np.count_nonzero(batch.status))
                batch.release()
            decode_s = (time.perf_counter() - start) / (sample.stop - sample.start)
        note = "; ".join(what for what, _ in ready.notes) or None
        fix = "; ".join(dict.fromkeys(fix for _, fix in ready.notes if fix)) or None
        if n and bad:
            undecoded = f"{bad} of {sample.stop - sample.start} sampled tiles cannot be decoded"
            note = f"{note}; {undecoded}" if note else undecoded
        return SlideReport(
            task.slide_id,
            reader=info.reader,
            reader_reason=info.reader_reason,
            codec=info.codec,
            size=info.level_dimensions[0],
            levels=len(info.level_dimensions),
            mpp=grid.slide_mpp,
            mpp_source=info.mpp_source,
            level=grid.level,
            mpp_effective=grid.mpp_effective,
            coarser=tuple((scale.level, scale.mpp_effective) for scale in ready.grids[1:]),
            tiles=every,
            bytes=every * tile_bytes(spec, dim, "float16"),
            seconds=None if encode_s is None else every * (max(encode_s, decode_s)),
            note=note,
            fix=fix,
        )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _openslide_version() -> Any:
    import openslide

    return openslide.__library_version__
