"""The commands over slides: `doctor`, `extract`, `status`."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from hmil_fast.cli.options import (
    Commands,
    add_command,
    add_old_name,
    batch,
    colour,
    count,
    count_or_none,
    path,
    positive,
    shard,
    share,
    store,
    tile_px,
)
from hmil_fast.errors import UsageError

if TYPE_CHECKING:  # they import torch, which --help does without
    from collections.abc import Callable

    from hmil_fast.extraction.doctor import SlideReport
    from hmil_fast.extraction.encoders import Encoder
    from hmil_fast.extraction.findings import Finding
    from hmil_fast.extraction.slides import SlideTask
    from hmil_fast.io.store.location import Location
    from hmil_fast.io.tiles.grid import TileSpec


def add_doctor(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `doctor`."""

    def run(args: argparse.Namespace) -> int:
        from hmil_fast.cli.extract_output import print_findings, print_slides
        from hmil_fast.device import pick_device
        from hmil_fast.extraction.doctor import machine_findings
        from hmil_fast.extraction.encoders import load_encoder
        from hmil_fast.extraction.findings import Finding

        findings = machine_findings()
        slides: list[SlideReport] = []
        if args.slides or args.manifest:
            tasks = _tasks(args, lambda text: findings.append(Finding("note", text)))
            encoder = None
            try:
                encoder = load_encoder(args.encoder, args.weights, pick_device("auto"))
            except UsageError as error:
                findings.append(Finding("bad", error.what, error.fix))
            more, slides = _examine(tasks, _tiles(args), encoder, args.store)
            findings += more
        if args.json:
            both = {"machine": [asdict(f) for f in findings], "slides": [asdict(s) for s in slides]}
            print(json.dumps(both, indent=1))
        else:
            print_findings(findings)
            print_slides(slides)
        return _exit_code(findings, slides)

    text = "Check this machine and inspect slides before extraction."
    parser = add_command(commands, "doctor", text, run)
    _slide_arguments(parser)
    parser.add_argument(
        "--store",
        type=store,
        metavar="STORE",
        help="where features would go: inspect 16 of the slides and estimate the whole job "
        "(default: inspect every slide)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def add_extract(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `extract`."""

    def run(args: argparse.Namespace) -> int:
        from hmil_fast.api.extract import JobOptions, extract
        from hmil_fast.cli.console import stderr
        from hmil_fast.cli.extract_output import print_findings, print_slides, print_summary
        from hmil_fast.cli.job_bar import JobBar
        from hmil_fast.device import pick_device
        from hmil_fast.extraction.encoders import EncoderChoice

        err = stderr()
        tasks = _tasks(args, lambda text: err.print(text, style="yellow", markup=False))
        encoder = EncoderChoice(args.encoder, args.weights, args.precision, args.compile)
        if args.dry_run:
            loaded = encoder.load(pick_device(args.device))
            findings, slides = _examine(tasks, _tiles(args), loaded, None, args.store)
            print_findings(findings)
            print_slides(slides)
            return _exit_code(findings, slides)
        options = JobOptions(
            device=args.device,
            workers=args.workers,
            engine=args.engine,
            scheduler=args.scheduler,
            shard=args.shard,
            batch_size=args.batch_size,
            threads=args.threads,
            lease_seconds=args.lease_seconds,
            hang_minutes=args.slide_timeout,
            retry_failed=args.retry_failed,
            preflight=not args.no_preflight,
        )
        with JobBar(err) as bar:
            summary = extract(
                tasks,
                args.store,
                _tiles(args),
                encoder,
                dtype=args.dtype,
                decode=args.decode,
                options=options,
                report=bar.update,
            )
        print_summary(summary, err)
        return 1 if summary.failed else 0

    text = "Extract features of slides into a store; run again, it resumes."
    parser = add_command(commands, "extract", text, run)
    _slide_arguments(parser)
    parser.add_argument("--store", type=store, required=True, metavar="STORE")
    parser.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="dtype of the stored features (default: float16)",
    )
    parser.add_argument(
        "--decode",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="what decodes the slides, fixed with the store: gpu decodes JPEG and JPEG 2000 "
        "straight into its memory (default: auto, by codec, encoder and cores a GPU)",
    )
    parser.add_argument(
        "--batch-size",
        type=batch,
        metavar="N",
        help="tiles per forward pass; halved where memory runs out (default: auto, by the memory)",
    )
    add_old_name(parser, "--batch", dest="batch_size", type=batch)
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="precision of the encoder (default: auto, bf16 on a GPU that has it, else fp32)",
    )
    parser.add_argument("--compile", action="store_true", help="compile the encoder first")
    parser.add_argument(
        "--threads", type=count, metavar="N", help="threads that decode (default: by the cores)"
    )
    parser.add_argument(
        "--device", default="auto", help="device: auto, cpu or cuda[:i] (default: auto)"
    )
    parser.add_argument(
        "--workers",
        type=count,
        metavar="N",
        help="worker processes (default: one a GPU; without a GPU this process alone)",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "dask"),
        default="local",
        help="engine that runs the workers: local, or dask on the hosts of --scheduler "
        "(default: local)",
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDR",
        help="address or scheduler file of a running dask cluster (default: start one here)",
    )
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="starting order only: extract the I-th of N parts first, then help with the others",
    )
    parser.add_argument(
        "--lease-seconds",
        type=positive,
        default=120.0,
        metavar="S",
        help="seconds without a heartbeat before another process takes over a slide (default: 120)",
    )
    parser.add_argument(
        "--slide-timeout",
        type=positive,
        default=30.0,
        metavar="MIN",
        help="end a worker that finishes no tile for this many minutes (default: 30)",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="retry slides abandoned after repeated worker crashes",
    )
    parser.add_argument(
        "--no-preflight", action="store_true", help="skip the size estimate and disk-space check"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="inspect the slides and write nothing"
    )


def add_status(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `status`."""

    def run(args: argparse.Namespace) -> int:
        from hmil_fast.cli.extract_output import print_status
        from hmil_fast.extraction.jobs.status import read_status

        status = read_status(args.store)
        if args.json:
            print(json.dumps(status, indent=1))
        else:
            print_status(status)
        return 1 if status["failed"] else 0

    text = "Show how far the extraction into a store is, on all machines."
    parser = add_command(commands, "status", text, run)
    parser.add_argument("store", type=store, metavar="STORE")
    parser.add_argument("--json", action="store_true", help="print the status as JSON")


def _tasks(args: argparse.Namespace, tell: "Callable[[str], None]") -> "list[SlideTask]":
    from hmil_fast.extraction.slides import collect_slides

    return collect_slides(args.slides, args.manifest, args.slide_mpp, args.reader, args.glass, tell)


def _tiles(args: argparse.Namespace) -> "TileSpec":
    from hmil_fast.io.tiles.grid import TileSpec

    mpp, *coarser = sorted(args.mpp or [0.5])
    return TileSpec(
        args.tile_size,
        mpp,
        args.min_tissue,
        args.allow_upsample,
        tuple(coarser),
        args.views,
        args.view_seed,
        args.stain_norm,
    )


def _examine(
    tasks: "list[SlideTask]",
    tiles: "TileSpec",
    encoder: "Encoder | None",
    store: "Location | None",
    disk: "Location | None" = None,
) -> "tuple[list[Finding], list[SlideReport]]":
    """Examine slides with progress on stderr; see `hmil_fast.extraction.doctor.examine`."""
    from rich.markup import escape

    from hmil_fast.cli.console import stderr
    from hmil_fast.cli.job_bar import searching
    from hmil_fast.extraction.doctor import examine

    err = stderr()
    with err.status("") as status:

        def watch(slide_id: str, before: int, share: float, px: int) -> None:
            if px:
                err.print(f"{slide_id}: {searching(share, px)}", markup=False, style="dim")
            else:
                status.update(escape(f"{before} of {len(tasks)} slides: {slide_id}"))

        return examine(tasks, tiles, encoder, store, disk, watch)


def _exit_code(findings: "list[Finding]", slides: "list[SlideReport]") -> int:
    bad = any(finding.state == "bad" for finding in findings)
    return 1 if bad or any(slide.error for slide in slides) else 0


def _slide_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slides", nargs="*", metavar="SLIDES", help="files, folders or globs")
    parser.set_defaults(words="slides")
    parser.add_argument(
        "--manifest", type=path, metavar="CSV", help="slides as a table path[,slide_id][,mpp]"
    )
    parser.add_argument(
        "--slide-mpp",
        type=positive,
        metavar="X",
        help="µm/px of level 0 for slides that state none or an implausible one (default: refuse "
        "them)",
    )
    readers = parser.add_mutually_exclusive_group()
    readers.add_argument(
        "--reader",
        choices=("raw", "nvimagecodec", "cucim", "libjpeg-turbo", "openslide"),
        help="CPU reader for all slides (default: the first that reads a slide right)",
    )
    readers.add_argument(
        "--strict-tiles",
        action="store_const",
        const="strict",
        dest="reader",
        help="refuse JPEG tiles of which the decoder warns, as OpenSlide does",
    )
    parser.add_argument(
        "--glass",
        type=colour,
        metavar="R,G,B",
        help="grey levels of the empty glass (default: measured on each slide)",
    )
    parser.add_argument(
        "--tile-size",
        type=tile_px,
        default=256,
        metavar="PX",
        help="side of a tile in px (default: 256)",
    )
    add_old_name(parser, "--tile", dest="tile_size", type=tile_px)
    parser.add_argument(
        "--mpp",
        type=positive,
        action="append",
        metavar="X",
        help="µm/px of the tiles; repeat it for several scales (default: 0.5)",
    )
    parser.add_argument(
        "--min-tissue",
        type=share,
        default=0.25,
        metavar="SHARE",
        help="least share of tissue in a tile (default: 0.25)",
    )
    parser.add_argument(
        "--allow-upsample", action="store_true", help="accept slides that are coarser than --mpp"
    )
    parser.add_argument(
        "--views",
        type=count_or_none,
        default=0,
        metavar="K",
        help="augmented views of every tile, stored beside the plain one (default: 0)",
    )
    parser.add_argument(
        "--view-seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the augmented views (default: 0)",
    )
    parser.add_argument(
        "--stain-norm",
        choices=("none", "macenko"),
        default="none",
        help="normalisation of the stains of every slide (default: none)",
    )
    parser.add_argument(
        "--encoder",
        default="efficientnet-lite0",
        metavar="NAME",
        help="encoder: a card that `doctor` lists, or any timm model (default: efficientnet-lite0)",
    )
    parser.add_argument(
        "--weights",
        type=path,
        metavar="FILE",
        help=".safetensors or .pth of the encoder (default: from the package or the hub)",
    )
