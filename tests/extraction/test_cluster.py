"""Jobs on a dask cluster: real schedulers and workers, killed, stopped, out of reach."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from hmil_fast.cli.main import main
from hmil_fast.extraction.jobs.status import read_status

pytest.importorskip("distributed")

Start = Callable[..., "subprocess.Popen[str]"]
CheckStore = Callable[[Path], dict[str, bytes]]
T = TypeVar("T")

pytestmark = pytest.mark.usefixtures("own_signals")
SLIDES = 5


def command(slides: Path, store: Path, *more: object) -> list[object]:
    args = [
        "extract",
        slides,
        "--store",
        store,
        "--mpp",
        1,
        "--batch-size",
        4,
        "--lease-seconds",
        60,
    ]
    return [*args, "--engine", "dask", *more]


@pytest.fixture
def dask() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts `dask ARGS`."""
    running: list[subprocess.Popen[str]] = []
    env = os.environ | {"OMP_WAIT_POLICY": "passive"}

    def start(*args: object) -> "subprocess.Popen[str]":
        said = subprocess.DEVNULL
        words = [sys.executable, "-m", "dask", *map(str, args)]
        running.append(subprocess.Popen(words, env=env, stdout=said, stderr=said, text=True))
        return running[-1]

    yield start
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def soon(holds: Callable[[], T]) -> T:
    """What `holds` returns once it is true."""
    until = time.monotonic() + 600
    while not (found := holds()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


def pids_at_work(store: Path) -> list[int]:
    if not (store / "store.json").exists():
        return []
    return sorted({lease["pid"] for lease in read_status(store)["in_work"]})


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_killed_worker_costs_no_slide(
    start: Start, slides: Path, tmp_path: Path, check_store: CheckStore
) -> None:
    store = tmp_path / "store"
    job = start(*command(slides, store, "--workers", 2))
    os.kill(soon(lambda: pids_at_work(store))[0], signal.SIGKILL)
    out, err = job.communicate(timeout=600)
    assert job.returncode == 0, err
    assert " is gone" in err
    assert out.startswith((f"{SLIDES} slides extracted", f"{SLIDES - 1} slides extracted"))
    assert main(["store", "sweep", str(store), "--older-than", "0", "--delete"]) == 0
    assert len(check_store(store)) == SLIDES
    assert list((store / "leases").iterdir()) == []


@pytest.mark.slow
def test_nothing_outlives_a_killed_command(start: Start, slides: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    job = start(*command(slides, store, "--workers", 2))
    pids = soon(lambda: pids_at_work(store))
    job.kill()
    soon(lambda: not any(map(alive, pids)))


@pytest.mark.slow
def test_a_cluster_of_several_hosts(
    start: Start,
    dask: Callable[..., "subprocess.Popen[str]"],
    slides: Path,
    tmp_path: Path,
    check_store: CheckStore,
) -> None:
    store, file = tmp_path / "store", tmp_path / "scheduler.json"
    where = ["--host", "127.0.0.1", "--port", 0, "--no-dashboard"]
    scheduler = dask("scheduler", *where, "--scheduler-file", file)
    soon(file.exists)
    workers = [
        dask("worker", "--scheduler-file", file, "--no-dashboard", "--nthreads", 1)
        for _ in range(2)
    ]
    args = command(slides, store, "--scheduler", file)

    job = start(*args)
    soon(lambda: pids_at_work(store))
    job.kill()  # nobody is left to tell the workers, but dask
    soon(lambda: not pids_at_work(store))
    assert all(worker.poll() is None for worker in workers)

    job = start(*args)
    soon(lambda: pids_at_work(store))
    job.terminate()
    _, err = job.communicate(timeout=600)
    assert job.returncode == 143, err
    soon(lambda: not list((store / "leases").iterdir()))  # also those of the job before

    job = start(*args)
    soon(lambda: pids_at_work(store))
    scheduler.kill()
    out, err = job.communicate(timeout=600)
    assert job.returncode == 1, err
    assert "the dask scheduler is gone" in err
    assert "all processes of the job have ended" in out
    soon(lambda: not pids_at_work(store))
    found = read_status(store)
    assert len(check_store(store)) == found["committed"] < SLIDES


def test_what_is_wrong_is_said_in_two_lines(
    slides: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = list(map(str, command(slides, tmp_path / "store")))
    monkeypatch.setattr("hmil_fast.extraction.engines.dask_cluster.CONNECT_SECONDS", 0.5)
    for scheduler, said in (
        (f"{tmp_path}/none.json", "file"),
        (f"{tmp_path}/none", "file"),
        (f"127.0.0.1:{free_port()}", "no dask scheduler at 127.0.0.1"),
        ("bad://x", "no dask scheduler at bad://x"),
    ):
        assert main([*args, "--scheduler", scheduler]) == 2
        what, fix = capsys.readouterr().err.strip().splitlines()
        assert said in what
        assert fix.startswith("Fix: start one with `dask scheduler")
        assert (tmp_path / "store").exists() == ("file" not in said)  # seen before one is made
    assert main([*args[:-2], "--scheduler", "127.0.0.1:1"]) == 2
    assert "without --engine dask" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(args) == 2
    assert 'Fix: run pip install "hmil-fast[cluster]"' in capsys.readouterr().err
