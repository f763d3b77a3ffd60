"""The command line: every command parses its arguments, then calls one function.

Data goes to stdout, everything else to stderr. Exit codes: 0 all good, 1 some slides failed
(listed), 2 bad usage or input, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

import argparse
import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from hmil_fast import __version__
from hmil_fast.cli.options import (
    Command,
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
from hmil_fast.cli.results import add_compare, add_export, add_results, add_splits
from hmil_fast.cli.store import add_store
from hmil_fast.config import MODELS, PRESETS
from hmil_fast.errors import HmilError, Stopped, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a locale without ✓ and µ ends no job
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # OpenMP's threads spin while they wait, which on busy cores costs more than the work itself
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes a list of words in one piece only; those behind an option come back here
    if rest and ("words" not in args or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        getattr(args, args.words).extend(rest)
    command: Command = args.run

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        return command(args)
    except HmilError as error:
        sys.stderr.write(f"hmil-fast: {error}\n")
        return 2
    except Stopped as stopped:
        sys.stderr.write("\nhmil-fast: stopped; the same command resumes\n")
        return stopped.exit_code
    except BrokenPipeError:  # the reader of our output, `head` for instance, has gone
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, a folder that may not be written to
        sys.stderr.write(f"hmil-fast: {error}\nFix: mend that, then run the same command again\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hmil-fast",
        description="Whole-slide images in, diagnoses on a label tree out.",
        epilog="Start with `hmil-fast demo`, or `hmil-fast doctor SLIDES` on slides of yours.",
    )
    parser.add_argument("--version", action="version", version=f"hmil-fast {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_doctor(commands)
    _add_extract(commands)
    _add_status(commands)
    add_store(commands)
    _add_train(commands)
    add_splits(commands)
    add_results(commands)
    add_compare(commands)
    add_export(commands)
    _add_bench(commands)
    _add_demo(commands)
    return parser


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


def _add_doctor(commands: "Commands[argparse.ArgumentParser]") -> None:
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


def _add_extract(commands: "Commands[argparse.ArgumentParser]") -> None:
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


def _add_status(commands: "Commands[argparse.ArgumentParser]") -> None:
    def run(args: argparse.Namespace) -> int:
        from hmil_fast.extraction.jobs.status import status

        return status(args)

    text = "Say how far the extraction into a store is, on any machine, while it runs."
    parser = add_command(commands, "status", text, run)
    parser.add_argument("store", type=store, metavar="STORE")
    parser.add_argument("--json", action="store_true", help="the same as JSON on stdout")


def _add_train(commands: "Commands[argparse.ArgumentParser]") -> None:
    def run(args: argparse.Namespace) -> int:
        from hmil_fast.api.runs import train

        return train(args)

    text = "Train and evaluate by cross-validation; run again, it resumes."
    parser = add_command(commands, "train", text, run)
    parser.add_argument("--store", type=store, required=True, metavar="STORE")
    parser.add_argument(
        "--labels",
        type=path,
        required=True,
        metavar="CSV",
        help="slide_id,label[,patient_id][,split]",
    )
    parser.add_argument(
        "--tree",
        type=path,
        required=True,
        metavar="YAML",
        help="nested mapping whose leaves are the labels",
    )
    parser.add_argument(
        "--leaves-only",
        action="store_true",
        help="leave out slides whose label is an inner node of the tree",
    )
    parser.add_argument(
        "--splits", type=path, metavar="JSON", help="take the folds of this manifest as they are"
    )
    parser.add_argument("--out", type=path, required=True, metavar="RUN")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="train anew where RUN holds a run; that one is renamed to RUN.bak-<time>",
    )
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--folds", type=count)
    parser.add_argument("--epochs", type=count)
    parser.add_argument(
        "--mpp", type=positive, metavar="X", help="scale of a store that has several (the finest)"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device")
    parser.add_argument(
        "--config", type=path, metavar="YAML", help="settings; flags and key=value win over it"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="any setting of config.yaml"
    )
    parser.set_defaults(words="settings")


def _add_bench(commands: "Commands[argparse.ArgumentParser]") -> None:
    def run(args: argparse.Namespace) -> int:
        cases = Path(__file__).resolve().parent.parent / "bench"
        if not cases.is_dir() or find_spec("pytest_benchmark") is None:
            raise UsageError(
                "the benchmarks need a checkout of the repository and pytest-benchmark",
                'clone it and run `pip install -e ".[bench]"`, or `make bench`',
            )
        python, kernels = [sys.executable, "-m"], cases / "kernels"
        chosen = [cases] if args.what == "all" else [cases / f"test_bench_{args.what}.py"]
        options = ["--benchmark-only", "--benchmark-columns=median,iqr,rounds", "-q", "-s"]
        options += [f"--benchmark-json={args.json.resolve()}"] if args.json else []
        code = 0
        if args.what != "kernels":
            options.append(f"--ignore={kernels}")
            code = subprocess.call(
                [*python, "pytest", *options, *map(str, chosen)], cwd=cases.parent
            )
        if args.what in ("all", "kernels"):
            file = args.json and args.json.resolve()
            file = file and (file.with_suffix(".kernels.json") if args.what == "all" else file)
            options = ["--json", str(file)] if file else []
            code |= subprocess.call([*python, "bench.kernels", *options], cwd=cases.parent)
        return code

    text = "Measure this machine (needs a checkout)."
    parser = add_command(commands, "bench", text, run)
    parser.add_argument(
        "what",
        nargs="?",
        default="all",
        choices=("all", "decode", "store", "extract", "train", "one_bag", "big_bag", "kernels"),
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="write the numbers as JSON")


def _add_demo(commands: "Commands[argparse.ArgumentParser]") -> None:
    def run(args: argparse.Namespace) -> int:
        from hmil_fast.demo.run import demo

        return demo(args.out)

    text = "The whole job on real tissue: extract, train, evaluate, draw, report."
    parser = add_command(commands, "demo", text, run)
    parser.add_argument("--out", type=path, default=Path("demo-out"), metavar="DIR")


if __name__ == "__main__":
    sys.exit(main())
