"""Jobs of several processes: workers that are killed, jobs that are stopped, shards, status."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hmil_fast.cli.main import main
from hmil_fast.extraction.jobs.status import read_status
from hmil_fast.extraction.jobs.worklist import in_order
from hmil_fast.extraction.slides import SlideTask

Start = Callable[..., "subprocess.Popen[str]"]
CheckStore = Callable[[Path], dict[str, bytes]]

pytestmark = pytest.mark.usefixtures("own_signals")
SLIDES = 6


def command(slides: Path, store: Path) -> list[object]:
    return ["extract", slides, "--store", store, "--mpp", 1, "--batch-size", 4, "--workers", 2]


def events(store: Path) -> dict[int, list[dict[str, Any]]]:
    """By the pid of who wrote them."""
    files = (store / "events").glob("*.jsonl")
    return {
        int(file.stem.rsplit("-", 1)[1]): [json.loads(line) for line in file.open()]
        for file in files
    }


def wait_for_work(store: Path, workers: int) -> list[int]:
    """Until so many processes are at slides; their pids."""
    until = time.monotonic() + 600
    while time.monotonic() < until:
        if store.exists() and (store / "store.json").exists():
            pids = sorted({lease["pid"] for lease in read_status(store)["in_work"]})
            if len(pids) == workers:
                return pids
        time.sleep(0.02)
    raise AssertionError("no slide was begun")


def stopped_at_work(store: Path, pids: list[int]) -> int:
    """One of the processes, stopped at a slide that is not in the store yet."""
    until = time.monotonic() + 600
    while time.monotonic() < until:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            while state(pid) != "T":
                time.sleep(0.001)
            if any(lease["pid"] == pid for lease in read_status(store)["in_work"]):
                return pid
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.02)
    raise AssertionError("no slide was in work")


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0]
    except FileNotFoundError:
        return ""


def alive(pid: int) -> bool:
    return state(pid) not in {"Z", ""}


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_slide_done_by_another(
    start: Start, slides: Path, tmp_path: Path, check_store: CheckStore
) -> None:
    store = tmp_path / "store"
    job = start(*command(slides, store), "--lease-seconds", 60)
    killed = stopped_at_work(store, wait_for_work(store, 2))
    now = read_status(store)
    assert now["processes"] == 2
    assert now["left"] == SLIDES - now["committed"]
    assert not any(lease["dead"] for lease in now["in_work"])
    os.kill(killed, signal.SIGKILL)
    out, err = job.communicate(timeout=600)
    assert job.returncode == 0, err
    assert f"worker {killed} was killed by SIGKILL while it worked on s" in err
    assert out.startswith(f"{SLIDES} slides extracted")
    assert main(["store", "sweep", str(store), "--older-than", "0", "--delete"]) == 0
    assert len(check_store(store)) == SLIDES
    done = [
        line["slide_id"]
        for lines in events(store).values()
        for line in lines
        if line["event"] == "slide done"
    ]
    assert max(Counter(done).values()) == 1
    assert list((store / "leases").iterdir()) == []
    now = read_status(store)
    assert (now["committed"], now["left"], now["in_work"]) == (SLIDES, 0, [])
    assert now["failed"] == []
    assert now["processes"] == 0  # the killed one is gone from this machine


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_job_and_leave_nothing(
    start: Start, slides: Path, tmp_path: Path, check_store: CheckStore, number: signal.Signals
) -> None:
    store = tmp_path / "store"
    job = start(*command(slides, store))
    pids = wait_for_work(store, 2)
    job.send_signal(number)
    _, err = job.communicate(timeout=600)
    until = time.monotonic() + 600
    while any(map(alive, pids)):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert "Traceback" not in err
    assert job.returncode == (143 if number == signal.SIGTERM else -9)
    assert len(check_store(store)) < SLIDES
    assert list((store / "leases").iterdir()) == []


def test_a_poison_slide_and_a_broken_one_are_named(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], check_store: CheckStore
) -> None:
    store = tmp_path / "store"
    (slides / "s1.tif").write_text("no slide")
    for number in range(3, SLIDES):
        (slides / f"s{number}.tif").unlink()
    args = ["extract", str(slides), "--store", str(store), "--mpp", "2", "--lease-seconds", "0.2"]
    (store / "leases").mkdir(parents=True)
    for deaths in range(3):
        (store / "leases" / f"s0.{deaths}").write_text('{"host": "gone", "pid": 7}')
    assert main(args) == 1
    out = capsys.readouterr().out
    assert out.startswith("1 slides extracted")
    assert "2 failed" in out
    assert "s0: slide 's0': 3 processes died while they worked on it" in out
    assert list(check_store(store)) == ["s2"]
    assert main(["status", str(store), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["committed"], found["left"]) == (1, 0)
    said = {slide["slide_id"]: (slide["error"], slide["fix"]) for slide in found["failed"]}
    assert "3 processes died" in said["s0"][0]
    assert "s1.tif" in said["s1"][0]
    assert "--retry-failed" in said["s0"][1]
    (slides / "s1.tif").unlink()
    assert main(args) == 1
    assert "3 processes died" in capsys.readouterr().out
    assert main([*args, "--retry-failed"]) == 0
    assert main(["status", str(store)]) == 1  # s1 failed and was never done
    assert "2 slides in the store, 0 left, 1 failed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_slide_that_hangs_is_given_up_and_the_others_go_on(
    start: Start, slides: Path, tmp_path: Path, check_store: CheckStore
) -> None:
    store, mrxs = tmp_path / "store", slides / "hangs.mrxs"
    for number in range(1, SLIDES):
        (slides / f"s{number}.tif").unlink()
    mrxs.write_bytes(b"\xff\xd8")
    mrxs.with_suffix("").mkdir()
    os.mkfifo(mrxs.with_suffix("") / "Slidedat.ini")  # whoever opens it waits for ever
    args = [*command(mrxs, store)[:-2], "--slide-timeout", 0.02]
    job = start(*args)
    assert "Fix: run the same command with --workers 1" in job.communicate(timeout=600)[1]
    assert job.returncode == 1
    (store / "leases" / "hangs.1").write_text('{"host": "gone", "seconds": 0}')
    args = [*command(slides, store)[:-1], 1, "--slide-timeout", 0.5]
    out, err = start(*args).communicate(timeout=600)
    assert "was ended, no tile was done for 0.5 minutes while it worked on hangs" in err
    assert out.startswith("1 slides extracted"), err
    assert "hangs: slide 'hangs': 3 processes died while they worked on it" in out
    assert list(check_store(store)) == ["s0"]
    mrxs.unlink()
    shutil.copy(slides / "s0.tif", mrxs.with_suffix(".tif"))
    assert main([*map(str, args[:-4]), "--retry-failed"]) == 0
    assert list(check_store(store)) == ["hangs", "s0"]


def test_shards_are_the_same_in_any_order(tmp_path: Path) -> None:
    tasks = []
    for number in range(40):
        path = tmp_path / f"{number}.svs"
        path.write_bytes(b"x" * (number % 7))
        tasks.append(SlideTask(f"slide {number}", path))
    firsts = []
    for index in (1, 2, 3):
        order = in_order(tasks, (index, 3))
        assert {task.slide_id for task in in_order(tasks[::-1], (index, 3))} == {
            task.slide_id for task in tasks
        }
        sizes = [task.path.stat().st_size for task in order]
        own = next(n for n in range(5, 40) if n == 39 or sizes[n] > sizes[n - 1])
        assert sizes[:own] == sorted(sizes[:own], reverse=True)
        first = {task.slide_id for task in order[:own]}
        assert first == {task.slide_id for task in in_order(tasks[::-1], (index, 3))[:own]}
        firsts.append(first)
    assert sum(map(len, firsts)) == len(set.union(*firsts)) == len(tasks)


def test_a_wrong_shard_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0/4", "5/4", "4", "a/b"):
        with pytest.raises(SystemExit):
            main(["extract", "x.svs", "--store", "s", "--shard", text])
        assert "is not I/N" in capsys.readouterr().err
