"""`hmil-fast doctor`: what this machine has, and what is to be known of slides before a job."""

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from hmil_fast.errors import HmilError, StoreError, UsageError
from hmil_fast.extraction.encoders import (
    DEFAULT_ENCODER,
    Encoder,
    encoder_names,
    first_line,
    load_encoder,
    plugins,
)
from hmil_fast.extraction.jobs.progress import searching
from hmil_fast.extraction.preflight import (
    estimate,
    nbytes,
    require_space,
    sample,
    tile_bytes,
    tile_seconds,
)
from hmil_fast.extraction.prepare import each_tenth, prepare_slide
from hmil_fast.extraction.slides import SlideTask, collect_slides
from hmil_fast.io.slide import Progress
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.location import Location
from hmil_fast.io.tiles.decode import decode_tiles
from hmil_fast.io.tiles.grid import TileSpec
from hmil_fast.kernels.dispatch import describe

PACKAGES = ("hmil-fast", "torch", "triton", "timm", "zarr", "numcodecs", "openslide-python")
PROBE_TILES = 32
SIGNS = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "bad": "[red]✗[/]"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: its state ("ok", "note" or "bad"), and what to do about it."""

    state: str
    what: str
    fix: str = ""


@dataclass(frozen=True)
class SlideReport:
    """What a job has to expect of one slide; fields after `fix` are empty where `error` is set.

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


def doctor(args: argparse.Namespace) -> int:
    """Look at the machine and at slides; returns 1 where something cannot be used.

    Raises:
        UsageError: No slides where some are named, a bad manifest, or no such encoder.
    """
    findings = machine_findings()
    slides: list[SlideReport] = []
    if args.slides or args.manifest:
        said: list[str] = []
        tasks = collect_slides(
            args.slides, args.manifest, args.slide_mpp, args.reader, args.glass, said.append
        )
        findings += [Finding("note", text) for text in said]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder: Encoder | None = None
        try:
            encoder = load_encoder(args.encoder, args.weights, device)
        except UsageError as error:
            findings.append(Finding("bad", error.what, error.fix))
        spec = tile_spec(args)
        chosen = tasks if args.store is None else sample(tasks)
        slides, more = slide_reports(chosen, spec, encoder, args.store or Path.cwd())
        findings += more
        if args.store is not None and encoder is not None:
            findings.append(_whole_job(tasks, slides, spec, encoder, args.store))
    if args.json:
        both = {"machine": [asdict(f) for f in findings], "slides": [asdict(s) for s in slides]}
        print(json.dumps(both, indent=1))
    else:
        _print_findings(findings)
        _print_slides(slides)
    return _exit_code(findings, slides)


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


def print_slides(
    tasks: Sequence[SlideTask], spec: TileSpec, encoder: Encoder, store: Location
) -> int:
    """Look at slides only (`extract --dry-run`); returns 1 where something cannot be used."""
    slides, findings = slide_reports(tasks, spec, encoder, store)
    _print_findings(findings)
    _print_slides(slides)
    return _exit_code(findings, slides)


def tile_spec(args: argparse.Namespace) -> TileSpec:
    """The tiles that a command line asks for."""
    mpp, *coarser = sorted(args.mpp or [0.5])
    return TileSpec(
        args.tile,
        mpp,
        args.min_tissue,
        args.allow_upsample,
        tuple(coarser),
        args.views,
        args.view_seed,
        args.stain_norm,
    )


def _exit_code(findings: Sequence[Finding], slides: Sequence[SlideReport]) -> int:
    bad = any(finding.state == "bad" for finding in findings)
    return 1 if bad or any(slide.error for slide in slides) else 0


def machine_findings() -> list[Finding]:
    """Hardware, versions, readers and encoders."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = [
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
            found.append(
                Finding("ok", f"GPU {i}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {bf16}")
            )
    else:
        found.append(
            Finding(
                "note",
                "no CUDA device: everything runs on the CPU in float32",
                "nothing, unless this machine has a GPU; then check `nvidia-smi` and its driver",
            )
        )
    found.append(Finding("ok", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)))
    for what, names in (
        ("slide reader nvImageCodec", ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12")),
        ("slide reader cuCIM", ("cucim-cu13", "cucim-cu12")),
        ("tile pipelines DALI", ("nvidia-dali-cuda130", "nvidia-dali-cuda120")),
    ):
        installed = [name for name in names if _version(name) != "missing"]
        if installed:
            found.append(Finding("ok", f"{what}: {installed[0]} {_version(installed[0])}"))
        else:
            text = 'pip install "hmil-fast[cu13]" (or [cu12]); until then the slower path serves'
            found.append(Finding("note", f"{what} is not installed", text))
    found.append(Finding("ok", f"kernels: {describe()}"))
    found.append(Finding("ok", f"slide reader OpenSlide {_openslide_version()}"))
    others = ", ".join(name for name in encoder_names() if name != DEFAULT_ENCODER)
    found.append(Finding("ok", f"encoder with packaged weights: {DEFAULT_ENCODER}"))
    text = f"encoders with weights from the hub or --weights: {others}, and any timm model"
    found.append(Finding("ok", text))
    cards, broken = plugins()
    if cards:
        text = ", ".join(card.name for card in cards)
        found.append(Finding("ok", f"encoders of plugins: {text}"))
    found += [Finding("note", error.what, error.fix) for error in broken]
    return found


def slide_reports(
    tasks: Sequence[SlideTask], spec: TileSpec, encoder: Encoder | None, store: Location
) -> tuple[list[SlideReport], list[Finding]]:
    """Open every slide, lay its grid, and time a sample of tiles.

    Args:
        tasks: The slides.
        spec: The tiles asked for.
        encoder: What would encode them; without one there are no times and sizes.
        store: Where features would go; it need not exist.
    """
    encode_s, dim = (None, 0) if encoder is None else (tile_seconds(encoder), encoder.card.dim)
    err = Console(stderr=True, soft_wrap=True, highlight=False)
    with err.status("") as status:
        reports = []
        for n, task in enumerate(tasks):
            status.update(escape(f"{n} of {len(tasks)} slides: {task.slide_id}"))
            reports.append(_report(task, spec, encode_s, dim, _progress(err, task)))
    if encoder is None:
        return reports, []
    need = sum(report.bytes for report in reports)
    findings = [Finding("ok", f"features of these slides: {nbytes(need)} (float16)")]
    free = backend_of(store).free_bytes(store)
    if free is not None and need > free:
        fix = "free some, or give a --store on a larger disk"
        findings.append(Finding("bad", f"the disk of {store} has {nbytes(free)} free", fix))
    return reports, findings


def _progress(err: Console, task: SlideTask) -> Progress:
    """Prints each tenth of the search for tissue on a large slide."""
    return each_tenth(
        lambda share, px: err.print(
            f"{task.slide_id}: {searching(share, px)}", markup=False, style="dim"
        )
    )


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
            bytes=every * (2 * dim * (1 + spec.views) + 9),
            seconds=None if encode_s is None else every * (max(encode_s, decode_s)),
            note=note,
            fix=fix,
        )


def _print_findings(findings: Sequence[Finding]) -> None:
    out = Console(soft_wrap=True, highlight=False)
    for finding in findings:
        out.print(f"{SIGNS[finding.state]} ", end="")
        out.print(finding.what, markup=False)
        if finding.fix:
            out.print(f"  Fix: {finding.fix}", markup=False, style="dim")


def _print_slides(slides: Sequence[SlideReport]) -> None:
    for s in slides:
        if s.error is not None:
            _print_findings([Finding("bad", f"{s.slide_id}: {s.error}", s.fix or "")])
            continue
        time_left = "" if s.seconds is None else f", about {max(s.seconds, 1):.0f} s"
        scales = ((s.level, s.mpp_effective), *s.coarser)
        levels, mpps = (
            " and ".join(f"{each:.4g}" for each in x) for x in zip(*scales, strict=True)
        )
        text = (
            f"{s.slide_id}: {s.reader}, {s.codec}, {s.size[0]}×{s.size[1]} px in {s.levels} "
            f"level{'s' * (s.levels > 1)}, {s.mpp:.4g} µm/px from {s.mpp_source}; reads level "
            f"{levels}, tiles of {mpps} µm/px: {s.tiles:,} tiles, "
            f"{nbytes(s.bytes)}{time_left}; {s.reader_reason}"
        )
        note = f" ({s.note})" if s.note else ""
        _print_findings([Finding("note" if note else "ok", text + note, s.fix or "")])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _openslide_version() -> Any:
    import openslide

    return openslide.__library_version__
