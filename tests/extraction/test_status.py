"""What people are told: who works, what failed, what could not be decoded, where time went."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from hmil_fast.cli.extract_output import print_summary
from hmil_fast.cli.main import main
from hmil_fast.errors import HmilError
from hmil_fast.extraction.jobs.events import EVENTS, Failures, retry_abandoned, save_job
from hmil_fast.extraction.jobs.leases import LEASES, MAX_DEATHS, Leases
from hmil_fast.extraction.jobs.status import read_status
from hmil_fast.extraction.jobs.summary import Collector
from hmil_fast.extraction.pipeline.result import SlideResult
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.store import FeatureStore, StoreSpec, create_store

# takes slides, says so, and waits to be killed
WORKER = """
import sys, time
from pathlib import Path
from hmil_fast.extraction.jobs.events import EventLog
from hmil_fast.extraction.jobs.leases import Leases
store, *slides = sys.argv[1:]
log, leases = EventLog(Path(store)), Leases(Path(store), 60.0, lambda: None)
log.alive("job start", 60.0)
for slide in slides:
    leases.take(slide)
time.sleep(0.05)
log.tiles = 100
log.write("slide start")
print("ready", flush=True)
sys.stdin.readline()
log.write("job end")
sys.stdin.readline()
"""
Child = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def worker() -> Iterator[Child]:
    running = []

    def begin(*args: object) -> "subprocess.Popen[str]":
        command, pipe = [sys.executable, "-c", WORKER, *map(str, args)], subprocess.PIPE
        running.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        assert running[-1].stdout.readline() == "ready\n"
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return create_store(tmp_path / "store", StoreSpec(4, "float32", {"name": "e"}, {}))


def put(store: FeatureStore, slide_id: str, bad: int = 0) -> None:
    with store.writer(slide_id, 2, {"bad_tiles": bad}) as writer:
        writer.append(np.ones((2, 4), np.float32))
        status = np.zeros(2, np.uint8)
        status[:bad] = 1
        writer.commit(np.zeros((2, 2), np.int32), status)


def in_work(path: Path) -> list[str]:
    return [lease["slide_id"] for lease in read_status(path)["in_work"]]


def test_a_killed_process_is_neither_counted_nor_at_a_slide(
    store: FeatureStore, worker: Child
) -> None:
    save_job(store.path, ["a", "b", "c"])
    killed, other = worker(store.path, "a"), worker(store.path, "b")
    assert sorted(in_work(store.path)) == ["a", "b"]
    assert read_status(store.path)["processes"] == 2
    assert read_status(store.path)["tiles_per_second"] > 0
    killed.kill()
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # a zombie, as without an init
    assert in_work(store.path) == ["b"]
    killed.wait()
    assert in_work(store.path) == ["b"]
    now = read_status(store.path)
    assert (now["processes"], now["left"], now["failed"]) == (1, 3, [])
    assert other.stdin is not None
    other.stdin.write("\n")
    other.stdin.flush()
    until = time.monotonic() + 600
    while read_status(store.path)["processes"]:  # it has said that its job is at its end
        assert time.monotonic() < until
    assert other.poll() is None
    assert read_status(store.path)["tiles_per_second"] == 0


def test_a_process_of_another_machine_is_counted_while_its_lease_would_live(
    store: FeatureStore,
) -> None:
    (store.path / EVENTS).mkdir()

    def says(seconds_ago: float) -> int:
        line = {"time": time.time() - seconds_ago, "event": "beat", "tiles": 5, "silent_s": 8}
        line |= {"machine": "another", "pid": 2**22 + 1}
        (store.path / EVENTS / "far-7.jsonl").write_text(json.dumps(line) + "\n")
        return int(read_status(store.path)["processes"])

    assert says(1) == 1
    assert says(9) == 0


def test_a_slide_is_in_work_or_failed_or_stored(store: FeatureStore) -> None:
    leases, failures = Leases(store.path, 60.0, lambda: None), Failures(store.path)
    for slide_id in ("failed", "stored", "again"):
        save_job(store.path, ["failed", "stored", "again"])
        if slide_id == "again":
            failures.record(slide_id, HmilError("bad disk", "mend it"))
            time.sleep(0.01)
        assert leases.take(slide_id)
    failures.record("failed", HmilError("bad slide", "leave it out"))
    put(store, "stored")
    now = read_status(store.path)
    leases.close()
    assert [lease["slide_id"] for lease in now["in_work"]] == ["again"]
    assert [slide["slide_id"] for slide in now["failed"]] == ["failed"]
    assert (now["committed"], now["left"]) == (1, 1)


def test_a_slide_that_is_to_be_tried_again_is_left_and_not_failed(
    store: FeatureStore, worker: Child
) -> None:
    save_job(store.path, ["a"])
    dead = worker(store.path, "a")
    dead.kill()
    dead.wait()
    first = store.path / LEASES / "a.0"
    for deaths in range(1, MAX_DEATHS):
        (store.path / LEASES / f"a.{deaths}").write_bytes(first.read_bytes())
    Failures(store.path).record("a", HmilError("3 processes died", "use --retry-failed"))
    assert (read_status(store.path)["left"], in_work(store.path)) == (0, [])
    retry_abandoned(store.path, ["a"])
    now = read_status(store.path)
    assert (now["left"], now["failed"]) == (1, [])


def test_undecodable_tiles_are_told_by_status_and_info(
    store: FeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    for slide_id, bad in (("good", 0), ("one", 1), ("two", 2)):
        put(store, slide_id, bad)
    assert read_status(store.path)["bad_tiles"] == {"one": 1, "two": 2}
    assert main(["status", str(store.path)]) == 0
    said = capsys.readouterr().out
    assert "  3 tiles of 2 slides cannot be decoded: two (2), one (1)\n" in said
    assert main(["store", "info", str(store.path)]) == 0
    slides = json.loads(capsys.readouterr().out)["slide_ids"]
    assert {name: slide["bad_tiles"] for name, slide in slides.items()} == {
        "good": 0,
        "one": 1,
        "two": 2,
    }


def summary(
    store: FeatureStore, capsys: pytest.CaptureFixture[str], messages: list[Any]
) -> tuple[str, str]:
    """What a job over slides a and b says at its end, on stdout and stderr."""
    err = io.StringIO()
    tasks = [SlideTask(name, Path(f"{name}.tif")) for name in ("a", "b")]
    collector = Collector(store, tasks, lambda event: None)
    put(store, "b")  # by one that died before it could say so
    for message in messages:
        collector(message)
    print_summary(collector.summary(2), Console(file=err, width=100))
    return capsys.readouterr().out, err.getvalue()


def test_the_summary_claims_no_other_jobs_and_keeps_undecodable_tiles(
    store: FeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = summary(store, capsys, [SlideResult("a", 53, 4, 1.0)])
    assert "1 slides extracted" in out
    assert ", 1 more is in the store, 0 were done before, 0 failed." in out
    assert "other jobs" not in out
    assert "\n  4 tiles of 1 slide cannot be decoded: a (4)\n" in out
    assert "where the time went" not in err  # nobody said it


def test_shares_of_the_time_add_up(store: FeatureStore, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"decode": 1e-6, "encode": 2e-6, "open (threads)": 1e-6}
    _, err = summary(store, capsys, [SlideResult("a", 53), {}, seconds, seconds])
    rows = dict(line.split("│")[1:4:2] for line in err.splitlines() if line.count("│") == 4)
    shares = {name.strip(): int(share.strip(" %")) for name, share in rows.items()}
    assert set(shares) == {*seconds, "other (starting, waiting)"}
    assert sum(share for name, share in shares.items() if name != "open (threads)") == 100
