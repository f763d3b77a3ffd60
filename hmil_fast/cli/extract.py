"""The commands over slides: `doctor`, `extract`, `status`."""

import argparse

from hmil_fast.cli.options import (
    Commands,
    add_command,
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


def add_doctor(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `doctor`."""

    def run(args: argparse.Namespace) -> int:
        from hmil_fast.extraction.doctor import doctor

        return doctor(args)

    text = "Say what this machine has, and what is to be known of slides before extracting them."
    parser = add_command(commands, "doctor", text, run)
    _slide_arguments(parser)
    parser.add_argument(
        "--store",
        type=store,
        metavar="STORE",
        help="where features would go: look at 16 of the slides and tell what the job needs",
    )
    parser.add_argument("--json", action="store_true", help="findings as JSON on stdout")


def add_extract(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `extract`."""

    def run(args: argparse.Namespace) -> int:
        from hmil_fast.api.extract import extract

        return extract(args)

    text = "Extract features of slides into a store; run again, it resumes."
    parser = add_command(commands, "extract", text, run)
    _slide_arguments(parser)
    parser.add_argument("--store", type=store, required=True, metavar="STORE")
    parser.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="of the stored features (float16)",
    )
    parser.add_argument(
        "--batch",
        type=batch,
        metavar="N",
        help="tiles a forward pass (auto: by the memory; halved where it runs out)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the encoder's layers (auto: bf16 on a GPU that has it, else fp32)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the encoder first (torch.compile)"
    )
    parser.add_argument("--threads", type=count, metavar="N", help="threads that decode")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:i]")
    parser.add_argument(
        "--workers", type=count, metavar="N", help="processes (one a GPU; one without a GPU)"
    )
    parser.add_argument(
        "--engine",
        choices=("local", "dask"),
        default="local",
        help="what runs the workers (local); dask: on the hosts of --scheduler, or on this one",
    )
    parser.add_argument(
        "--scheduler", metavar="ADDR", help="address or scheduler file of a running dask cluster"
    )
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="start with the I-th of N parts of the slides; then help with the others",
    )
    parser.add_argument(
        "--lease-seconds",
        type=positive,
        default=120.0,
        metavar="S",
        help="after which the slide of a process that died elsewhere is taken over (120)",
    )
    parser.add_argument(
        "--slide-timeout",
        type=positive,
        default=30.0,
        metavar="MIN",
        help="minutes without a tile after which a process at a slide is ended (30)",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="try slides again that were given up because processes died on them",
    )
    parser.add_argument(
        "--no-preflight",
        action="store_true",
        help="do not estimate tiles, bytes and time, nor refuse a disk too small",
    )
    parser.add_argument("--dry-run", action="store_true", help="look at the slides, write nothing")


def add_status(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `status`."""

    def run(args: argparse.Namespace) -> int:
        from hmil_fast.extraction.jobs.status import status

        return status(args)

    text = "Say how far the extraction into a store is, on any machine, while it runs."
    parser = add_command(commands, "status", text, run)
    parser.add_argument("store", type=store, metavar="STORE")
    parser.add_argument("--json", action="store_true", help="the same as JSON on stdout")


def _slide_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slides", nargs="*", metavar="SLIDES", help="files, folders or globs")
    parser.set_defaults(words="slides")
    parser.add_argument("--manifest", type=path, metavar="CSV", help="path[,slide_id][,mpp]")
    parser.add_argument(
        "--slide-mpp",
        type=positive,
        metavar="X",
        help="µm/px of level 0, for slides that state none or an implausible one",
    )
    readers = parser.add_mutually_exclusive_group()
    readers.add_argument(
        "--reader",
        choices=("raw", "nvimagecodec", "nvimagecodec-gpu", "cucim", "libjpeg-turbo", "openslide"),
        help="read slides with this one only (the first that reads a slide right; never the GPU, "
        "whose pixels differ)",
    )
    readers.add_argument(
        "--strict-tiles",
        action="store_const",
        const="strict",
        dest="reader",
        help="refuse JPEG tiles of which the decoder warns, as OpenSlide does (libjpeg-turbo reads "
        "them)",
    )
    parser.add_argument(
        "--glass",
        type=colour,
        metavar="R,G,B",
        help="grey levels of the empty glass, where it is not found right (found by itself)",
    )
    parser.add_argument(
        "--tile", type=tile_px, default=256, metavar="PX", help="edge of a tile (256)"
    )
    parser.add_argument(
        "--mpp",
        type=positive,
        action="append",
        help="µm/px of the tiles (0.5); repeated, features at several scales",
    )
    parser.add_argument(
        "--min-tissue",
        type=share,
        default=0.25,
        metavar="SHARE",
        help="least share of tissue in a tile (0.25)",
    )
    parser.add_argument(
        "--allow-upsample", action="store_true", help="take slides that are coarser than --mpp too"
    )
    parser.add_argument(
        "--views",
        type=count_or_none,
        default=0,
        metavar="K",
        help="augmented views of every tile, stored beside the plain one (0)",
    )
    parser.add_argument(
        "--view-seed", type=int, default=0, metavar="N", help="seed of what makes them differ (0)"
    )
    parser.add_argument(
        "--stain-norm",
        choices=("none", "macenko"),
        default="none",
        help="bring the stains of every slide to the same (none)",
    )
    parser.add_argument(
        "--encoder",
        default="efficientnet-lite0",
        metavar="NAME",
        help="a card (see doctor), or any timm model",
    )
    parser.add_argument(
        "--weights", type=path, metavar="FILE", help=".safetensors or .pth of the encoder"
    )
