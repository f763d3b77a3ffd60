"""The command line: parse a command, call its function, turn errors into exit codes.

Data goes to stdout, everything else to stderr. Exit codes: 0 all good, 1 some slides failed
(listed), 2 bad usage or input, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from hmil_fast import __version__
from hmil_fast.cli.extract import add_doctor, add_extract, add_status
from hmil_fast.cli.options import Command, Commands, add_command, path
from hmil_fast.cli.results import add_compare, add_export, add_results
from hmil_fast.cli.settings import add_settings
from hmil_fast.cli.store import add_store
from hmil_fast.cli.train import add_splits, add_train
from hmil_fast.errors import HmilError, Stopped, UsageError

_BENCHES = ("start", "decode", "store", "extract", "train", "one_bag", "big_bag")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a locale without ✓ and µ ends no job
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # OpenMP's threads spin while they wait, which on busy cores costs more than the work itself
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes a list of words in one piece only; words behind an option come back here
    if rest and ("words" not in args or any(word.startswith("-") for word in rest)):
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
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
        sys.stderr.write(
            f"hmil-fast: {error}\nFix: check the disk and the permissions there, then run the same "
            "command again\n"
        )
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hmil-fast",
        description="Whole-slide images in, diagnoses on a label tree out.",
        epilog="Start with `hmil-fast demo`, or `hmil-fast doctor SLIDES` on slides of yours.",
    )
    parser.add_argument("--version", action="version", version=f"hmil-fast {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_doctor(commands)
    add_extract(commands)
    add_status(commands)
    add_store(commands)
    add_train(commands)
    add_settings(commands)
    add_splits(commands)
    add_results(commands)
    add_compare(commands)
    add_export(commands)
    _add_bench(commands)
    _add_demo(commands)
    return parser


def _add_bench(commands: "Commands[argparse.ArgumentParser]") -> None:
    def run(args: argparse.Namespace) -> int:
        import subprocess
        from importlib.util import find_spec

        cases = Path(__file__).resolve().parent.parent.parent / "bench"
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
        choices=("all", *_BENCHES, "kernels"),
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="write the numbers as JSON")


def _add_demo(commands: "Commands[argparse.ArgumentParser]") -> None:
    def run(args: argparse.Namespace) -> int:
        from hmil_fast.cli.demo import demo

        return demo(args.out)

    text = "The whole job on real tissue: extract, train, evaluate, draw, report."
    parser = add_command(commands, "demo", text, run)
    parser.add_argument("--out", type=path, default=Path("demo-out"), metavar="DIR")


if __name__ == "__main__":
    sys.exit(main())
