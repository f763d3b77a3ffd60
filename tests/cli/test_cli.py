"""The command line itself: help, usage errors, exit codes, what it imports."""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hmil_fast import __version__
from hmil_fast.cli.main import _parser, main
from hmil_fast.cli.options import path
from hmil_fast.extraction.jobs.leases import Leases
from hmil_fast.io.slide.opening import READERS
from hmil_fast.io.store import StoreSpec, create_store, open_store

SlideFile = Callable[[str], Path]
COMMANDS = (
    "doctor", "extract", "store", "train", "splits", "evaluate", "predict", "heatmap", "report",
    "compare", "bench", "demo",
)  # fmt: skip
HEAVY = ("torch", "zarr", "numpy", "cucim", "nvidia", "timm", "openslide", "matplotlib", "rich")


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """One thread, which busy cores run quicker than two; and the handlers that main() replaces."""
    torch.set_num_threads(1)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from hmil_fast.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    for name in COMMANDS:
        assert f"\n    {name} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: hmil-fast {command} ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"hmil-fast {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "required: COMMAND"),
        ("extrakt x", "invalid choice: 'extrakt'"),
        ("extract x", "required: --store"),
        (
            "extract x --store s --tile-size 8",
            "--tile-size: '8' is not a whole number from 16 to 8192",
        ),
        ("extract x --store s --tile-size 25.6", "--tile-size: '25.6' is not a whole number"),
        ("extract x --store s --mpp 0", "--mpp: '0' is not a number above 0"),
        ("extract x --store s --slide-mpp nan", "--slide-mpp: 'nan' is not a number above 0"),
        ("extract x --store s --min-tissue 25", "'25' is not a number from 0 to 1"),
        ("extract x --store s --batch-size 0", "--batch-size: '0' is not a whole number from 1 up"),
        ("extract x --store s --unknown 3", "unrecognized arguments: --unknown"),
        ("store burn s", "invalid choice: 'burn'"),
        ("extract x --store s3:/bucket/e", "--store: 's3:/bucket/e' is not a store: give a folder"),
        ("status file:///s", "STORE: 'file:///s' is not a store: give a folder"),
        ("store export s s3://bucket/ex --format npy", "FOLDER: 's3://bucket/ex' is a URL"),
        ("demo --out gs://bucket/x", "--out: 'gs://bucket/x' is a URL"),
        ("report s3:/bucket/run", "RUN: 's3:/bucket/run' is a URL"),
    ],
)
def test_wrong_usage(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        ("extract --store {tmp}/s", "no slide found", "name slide files"),
        ("extract {tmp}/*.svs --store {tmp}/s", "no slide found in {tmp}/*.svs", "name slide"),
        ("extract --manifest {tmp}/m.csv --store {tmp}/s", "{tmp}/m.csv", "check the path"),
        ("extract x.svs --store {tmp}/s --encoder uni3", "called 'uni3'", "use one of"),
        ("extract x.svs --store {tmp}/s --weights {tmp}/w.pth", "no weights file", "check"),
        ("extract x.svs --store {tmp}/s --device tpu", "device 'tpu' cannot be used", "use auto"),
        ("extract {tmp}/file --store {tmp}/file/s", "creating the store", "Free some space"),
        ("extract s3://b/x.svs --store {tmp}/s", "'s3://b/x.svs' is a URL", "copy the slides"),
        ("extract x.svs --store {tmp}/s", "x.svs does not exist", "check the path"),
        ("store info {tmp}/s", "no feature store at {tmp}/s", "Give the folder"),
        ("store verify {tmp}", "no feature store at {tmp}", "Give the folder"),
        ("store sweep {tmp}", "no feature store at {tmp}", "Give the folder"),
        ("doctor {tmp}/none", "", ""),
    ],
)
def test_errors_say_what_and_the_fix(
    arguments: str, what: str, fix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    code = main([word.format(tmp=tmp_path) for word in arguments.split()])
    said = capsys.readouterr()
    if not what:  # a slide that is missing fails by itself
        assert code == 1
        assert "does not exist" in said.out
        return
    assert code == 2
    first, second = said.err.splitlines()
    assert first.startswith("hmil-fast: ")
    assert what.format(tmp=tmp_path) in first
    assert second.startswith(f"Fix: {fix}")
    assert said.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_doctor_without_slides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "encoder with packaged weights: efficientnet-lite0" in said
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["slides"] == []
    assert {finding["state"] for finding in found["machine"]} <= {"ok", "note"}
    assert all(finding["fix"] for finding in found["machine"] if finding["state"] != "ok")


def test_doctor_with_weights_out_of_reach(
    slide_file: SlideFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = str(slide_file("cmu1_small_pyramid.tif"))
    assert main(["doctor", slide, "--mpp", "2", "--weights", str(tmp_path / "none.pth")]) == 1
    said = capsys.readouterr().out
    assert "✗ no weights file" in said
    assert "✓ cmu1_small_pyramid: nvimagecodec, jpeg, " in said


def test_options_and_slides_in_any_order(
    slide_file: SlideFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = str(slide_file("cmu1_small_pyramid.tif")), str(slide_file("CMU-1-Small-Region.svs"))
    args = [
        "extract",
        one,
        "--mpp",
        "2",
        "--views",
        "0",
        "--dry-run",
        "--store",
        str(tmp_path / "s"),
        two,
    ]
    assert main(args) == 0
    said = capsys.readouterr().out
    assert "✓ cmu1_small_pyramid: " in said
    assert "✓ CMU-1-Small-Region: " in said


def test_a_coarse_slide_needs_the_users_word(
    slide_file: SlideFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = str(slide_file("cmu1_small_pyramid.tif"))
    args = ["extract", slide, "--mpp", "0.25", "--dry-run", "--store", str(tmp_path / "s")]
    assert main(args) == 1
    said = capsys.readouterr().out
    assert "coarser than the 0.25 asked for" in said
    assert "--allow-upsample" in said
    assert main([*args, "--allow-upsample"]) == 0


def test_a_store_without_a_slide_takes_the_settings_that_mend_the_first_try(
    slide_file: SlideFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide, store = str(slide_file("cmu1_small_pyramid.tif")), tmp_path / "s"
    args = ["extract", slide, "--tile-size", "512", "--store", str(store)]
    assert main([*args, "--mpp", "0.4"]) == 1
    assert "--allow-upsample" in capsys.readouterr().out
    assert main([*args, "--mpp", "0.4", "--allow-upsample"]) == 0
    made = (store / "store.json").read_bytes()
    capsys.readouterr()
    assert main([*args, "--mpp", "2"]) == 2  # now it holds a slide of these settings
    assert "holds other features" in capsys.readouterr().err
    assert (store / "store.json").read_bytes() == made


def test_a_store_that_a_job_fills_keeps_its_settings(
    slide_file: SlideFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide, store = str(slide_file("cmu1_small_pyramid.tif")), tmp_path / "s"
    spec = StoreSpec(1280, "float16", {"name": "another"}, {})
    create_store(store, spec)
    leases = Leases(store, 600.0, lambda: None)
    assert leases.take("x")
    args = ["extract", slide, "--mpp", "2", "--store", str(store)]
    assert main(args) == 2
    assert "holds other features" in capsys.readouterr().err
    leases.close()
    assert open_store(store).spec == spec
    assert main(args) == 0


@pytest.mark.slow
def test_a_pipe_that_closes_early_ends_without_a_word() -> None:
    command = [sys.executable, "-m", "hmil_fast.cli", "doctor", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(600) == 0
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_only_stores_are_urls() -> None:
    """Of every command, also of those that are yet to come."""

    def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    yield from parsers(inner)

    kinds = [action.type for each in parsers(_parser()) for action in each._actions]
    assert path in kinds
    assert Path not in kinds


def test_slides_are_read_by_the_reader_that_is_named(
    slide_file: SlideFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = str(slide_file("cmu1_small_pyramid.tif"))
    assert main(["doctor", slide, "--mpp", "2", "--reader", "openslide"]) == 0
    assert "✓ cmu1_small_pyramid: openslide, jpeg, " in capsys.readouterr().out
    for reader in READERS:  # the command line knows them all
        _parser().parse_args(["doctor", slide, "--reader", reader])
    with pytest.raises(SystemExit):
        main(["extract", slide, "--store", str(tmp_path / "s"), "--reader", "fastslide"])
    assert "nvimagecodec" in capsys.readouterr().err
