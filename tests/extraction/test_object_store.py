"""Jobs on a store in an object store, through the command line, against a real S3 server."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hmil_fast.cli.main import main
from hmil_fast.extraction.jobs.leases import Leases, held_by
from hmil_fast.extraction.jobs.status import read_status
from hmil_fast.io.store import open_store
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.location import location

Start = Callable[..., "subprocess.Popen[str]"]
Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("own_signals")
SLIDES = 4
TILES = ("--mpp", "1", "--batch-size", "4")

HOLDER = """
import sys
from hmil_fast.extraction.jobs.leases import Leases
from hmil_fast.io.store.location import location
leases = Leases(location(sys.argv[1]), 4.0, lambda: None)
print(leases.take("s") is not None, flush=True)
sys.stdin.readline()
leases.close()
"""


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0]


def stopped_at_work(store: str) -> int:
    """A worker, stopped at a slide that is not in the store yet."""
    until = time.monotonic() + 600
    while time.monotonic() < until:
        time.sleep(0.05)
        if not backend_of(location(store)).exists(location(store) / "store.json"):
            continue
        pids = {lease["pid"] for lease in read_status(store)["in_work"]}
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            while state(pid) != "T":
                time.sleep(0.001)
            if any(lease["pid"] == pid for lease in read_status(store)["in_work"]):
                return int(pid)
            os.kill(pid, signal.SIGCONT)
    raise AssertionError("no slide was in work")


@pytest.mark.slow
def test_a_job_with_a_killed_worker_makes_the_features_that_a_folder_gets(
    s3: str, start: Start, slide_file: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "slides").mkdir()
    for number in range(SLIDES):
        shutil.copy(
            slide_file("cmu1_small_pyramid.tif"), tmp_path / "slides" / f"µ #%2F{number}.tif"
        )
    args = ["extract", str(tmp_path / "slides"), "--store", s3, *TILES]
    job = start(*args, "--workers", 2, "--lease-seconds", 60)
    killed = stopped_at_work(s3)
    now = read_status(s3)
    assert now["processes"] in (1, 2)
    assert now["left"] == SLIDES - now["committed"]
    assert not any(lease["dead"] for lease in now["in_work"])
    os.kill(killed, signal.SIGKILL)
    out, err = job.communicate(timeout=600)
    assert job.returncode == 0, err
    assert f"worker {killed} was killed by SIGKILL while it worked on µ #%2F" in err
    assert out.startswith(f"{SLIDES} slides extracted")
    assert out.endswith(f"Store: {s3}\n")

    assert main([*args, "--shard", "2/3"]) == 0
    assert f"{SLIDES} were done before" in capsys.readouterr().out
    here = str(tmp_path / "store")
    one = str(tmp_path / "slides" / "µ #%2F0.tif")
    assert main(["extract", one, "--store", here, *TILES]) == 0
    there, (slide_id,) = open_store(s3), open_store(here).slide_ids()
    assert len(there.slide_ids()) == SLIDES
    digests = {there.record(name).content_digest for name in there.slide_ids()}
    assert digests == {open_store(here).record(slide_id).content_digest}
    place = location(s3)
    assert len(backend_of(place).names(place / "overlays")) == SLIDES
    assert backend_of(place).names(place / "leases") == []

    capsys.readouterr()
    assert main(["status", s3, "--json"]) == 0
    now = json.loads(capsys.readouterr().out)
    assert (now["committed"], now["left"], now["in_work"], now["failed"]) == (SLIDES, 0, [], [])
    assert main(["store", "sweep", s3, "--older-than", "0", "--delete"]) == 0
    assert main(["store", "verify", s3]) == 0
    assert f"{SLIDES} slides checked, 0 damaged" in capsys.readouterr().out


def test_features_of_others_go_in_and_out(s3: str, tmp_path: Path, capsys: Capture) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(3):
        rows = np.random.default_rng(number).standard_normal((20, 8), np.float32)
        np.save(source / f"s{number}.npy", rows)
    assert main(["store", "import", str(source), s3, "--format", "npy"]) == 0
    assert main(["store", "import", str(source), s3, "--format", "npy"]) == 0
    assert "3 were done before" in capsys.readouterr().out
    assert main(["store", "drop", s3, "s1"]) == 0
    assert main(["store", "export", s3, str(tmp_path / "out"), "--format", "npy"]) == 0
    for name in ("s0", "s2"):
        there = np.load(next((tmp_path / "out").rglob(f"{name}.npy")))
        np.testing.assert_array_equal(there, np.load(source / f"{name}.npy"))
    shard = next(o.key for o in open_store(s3).record("s0").objects if "features/c" in o.key)
    attempt = location(s3) / "slides/s0" / open_store(s3).record("s0").attempt
    backend_of(attempt).replace(attempt / shard, b"broken")
    capsys.readouterr()
    assert main(["store", "verify", s3]) == 1
    said = capsys.readouterr().out
    assert said.startswith("s0: slide 's0' is damaged")
    assert f"{s3}/slides/s0/" in said
    assert main(["store", "repair", s3]) == 0
    assert open_store(s3).slide_ids() == ["s2"]


def test_what_the_server_refuses_is_told_in_words(
    s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    np.save(tmp_path / "s.npy", np.zeros((3, 4), np.float16))

    def told(*command: str) -> str:
        assert main(["store", *command]) == 2
        what, fix = capsys.readouterr().err.splitlines()
        assert fix.startswith("Fix: ")
        return f"{what} {fix}"

    take = ("import", str(tmp_path), "--format", "npy")
    for command in (("info", "s3://no-bucket/x"), (*take, "s3://no-bucket/y")):
        said = told(*command)
        assert "s3://no-bucket/" in said
        assert "Create the bucket" in said
    assert "no feature store at" in told("info", s3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    said = told(*take, "s3://cohort/down")
    assert "127.0.0.1:9" in said
    assert "AWS_ENDPOINT_URL" in said
    assert main(["extract", str(tmp_path / "s.svs"), "--store", "s3://cohort/down-too"]) == 2
    said = capsys.readouterr().err
    assert "after 2 retries" in said  # not after the 40 of later requests
    assert "AWS_ENDPOINT_URL" in said
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "AWS_ACCESS_KEY_ID" in told(*take, "s3://cohort/half-the-credentials")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    assert "AWS_ACCESS_KEY_ID" in told(*take, "s3://cohort/no-credentials")
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert "AWS_ALLOW_HTTP" in told("info", "s3://cohort/no-tls")


def test_a_stopped_process_is_succeeded_and_does_not_bring_its_lease_back(s3: str) -> None:
    store, pipe = location(s3), subprocess.PIPE
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, s3], stdin=pipe, stdout=pipe, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert held_by(store, holder.pid) == ["s"]
        mine = Leases(store, 0.2, lambda: None)
        until = time.monotonic() + 5
        while time.monotonic() < until:  # it is renewed, so it lives on beyond its time
            assert mine.take("s") is None
            time.sleep(0.1)
        holder.send_signal(signal.SIGSTOP)
        until = time.monotonic() + 600
        while (lease := mine.take("s")) is None:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert lease.deaths == 1
        mine.release("s")
        assert backend_of(store).names(store / "leases") == []
        holder.send_signal(signal.SIGCONT)
        time.sleep(0.6)
        assert backend_of(store).names(store / "leases") == []
        mine.close()
    finally:
        holder.kill()
        holder.communicate()
