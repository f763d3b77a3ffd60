"""The command line, in this process and as a child, and folders of real slides for it."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hmil_fast.cli.main import main
from hmil_fast.extraction.encoders import Encoder, load_encoder
from hmil_fast.io.store import open_store, slide_dirname

# on two busy cores OpenMP's barriers cost ten times what the second thread gives
ENV = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]
SlideFile = Callable[[str], Path]


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "hmil_fast.cli", *map(str, args)]


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Runs a command in this process, which has torch and the encoder's library loaded."""

    def run(*args: object) -> "subprocess.CompletedProcess[str]":
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with (
            pytest.MonkeyPatch.context() as patch,
            tempfile.TemporaryFile("w+", encoding="utf-8") as out,
            tempfile.TemporaryFile("w+", encoding="utf-8") as err,
        ):
            for name, value in ENV.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            try:
                code = main(list(map(str, args)))
            except SystemExit as end:  # argparse's usage errors
                code = int(end.code or 0)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
            texts = []
            for stream in (out, err):
                stream.seek(0)
                texts.append(stream.read())
        return subprocess.CompletedProcess(args, code, *texts)

    return run


@pytest.fixture(scope="session")
def cli_process() -> Cli:
    """Runs a command in a process of its own, with variables of its own."""

    def run(*args: object, **env: str) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            command(*args),
            env=os.environ | ENV | env,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []

    def begin(*args: object) -> "subprocess.Popen[str]":
        running.append(
            subprocess.Popen(
                command(*args),
                env=os.environ | ENV,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Restores the handlers that main() replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """As in the child processes: features of two threads differ in their last bits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return load_encoder("efficientnet-lite0", None, torch.device("cpu"))


@pytest.fixture(scope="session")
def check_store() -> Callable[[Path], dict[str, bytes]]:
    """Verifies a store and that nothing lies about in it; commits by slide id."""

    def check(path: Path) -> dict[str, bytes]:
        store = open_store(path)
        assert [finding for finding in store.verify() if not finding.ok] == []
        commits = {}
        for folder in (path / "slides").iterdir():
            entries = sorted(entry.name for entry in folder.iterdir())
            assert [name for name in entries if name != "commit.json"] in (
                [],
                [name for name in entries if name.startswith("a-")][:1],
            ), entries
            if entries:
                commits[folder.name] = (folder / "commit.json").read_bytes()
                assert entries[0].encode() in commits[folder.name]
        assert sorted(commits) == sorted(map(slide_dirname, store.slide_ids()))
        return commits

    return check


@pytest.fixture
def slides(slide_file: SlideFile, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """As many copies of a small slide as the test's file says in SLIDES."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for number in range(request.module.SLIDES):
        shutil.copy(slide_file("cmu1_small_pyramid.tif"), folder / f"s{number}.tif")
    return folder
