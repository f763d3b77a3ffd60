"""Stopping and crowding: signals, kills and two jobs at once on one store."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hmil_fast.io.store import open_store

Start = Callable[..., "subprocess.Popen[str]"]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
CheckStore = Callable[[Path], dict[str, bytes]]

SLIDES = 5


def wait_for_a_slide(process: "subprocess.Popen[str]") -> None:
    """Until one slide is done, so that the next one is under way."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("✓"):
            return
    raise AssertionError(f"no slide was extracted, exit code {process.wait()}")


@pytest.mark.slow
def test_a_stopped_job_is_resumed_by_the_same_command(
    start: Start, slides: Path, tmp_path: Path, check_store: CheckStore, cli: Cli
) -> None:
    store = tmp_path / "store"
    args = ("extract", slides, "--store", store, "--mpp", 1, "--batch-size", 4)
    kept: dict[str, bytes] = {}
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process = start(*args)
        wait_for_a_slide(process)
        process.send_signal(number)
        _, err = process.communicate(timeout=600)
        assert process.returncode == code
        if number == signal.SIGKILL:
            assert all(finding.ok for finding in open_store(store).verify())
            cli("store", "sweep", store, "--older-than", 0, "--delete")
        else:
            assert err.splitlines()[-1] == "hmil-fast: stopped; the same command resumes"
            assert "Traceback" not in err
        now = check_store(store)
        assert now.items() >= kept.items()
        assert len(kept) < len(now) < SLIDES
        kept = now
    done = cli(*args)
    assert done.returncode == 0
    assert f"{len(kept)} were done before, 0 failed" in done.stdout
    whole = check_store(store)
    assert len(whole) == SLIDES
    assert whole.items() >= kept.items()
    assert len({json.loads(commit)["content_digest"] for commit in whole.values()}) == 1


@pytest.mark.slow
def test_two_jobs_at_once_do_every_slide_once(
    start: Start, slides: Path, tmp_path: Path, check_store: CheckStore
) -> None:
    store = tmp_path / "store"
    jobs = [
        start("extract", slides, "--store", store, "--mpp", 2, "--shard", f"{part}/2")
        for part in (1, 2)
    ]
    made = 0
    for process in jobs:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert ", 0 failed" in out
        made += int(out.split()[0])
    assert made == len(check_store(store)) == SLIDES
    assert list((store / "leases").iterdir()) == []
