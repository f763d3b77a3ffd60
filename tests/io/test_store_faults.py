"""Killed, racing and starved writers: real processes, real signals, real full disks."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hmil_fast.errors import StoreError
from hmil_fast.io.store import FeatureStore, SlideWriter, StoreSpec, create_store, open_store

DIM = 64
N = 4000
MOUNT = shutil.which("mount") or "/bin/mount"
UMOUNT = shutil.which("umount") or "/bin/umount"
SPEC = StoreSpec(DIM, "float16", {"name": "toy"}, {"mpp": 0.5})

# Imports once, then forks a writer for every line it is told: one process per slide written,
# without a second of imports before each. zarr starts its threads only after the fork.
NURSERY = """
import json, os, signal, sys, time
import numpy as np, zarr, zarr.codecs
from hmil_fast.io.store import SlideWriter, open_store

def write(path, slide_id, value, n, at):
    store = open_store(path)
    time.sleep(max(0, at - time.time()))
    rows = np.full((n, store.spec.dim), value, np.float16)
    with SlideWriter(store.path, store.spec, slide_id, n, {"value": value}, 512) as writer:
        for start in range(0, n, 100):
            writer.append(rows[start:start + 100])
        return writer.commit(np.full((n, 2), value), np.zeros(n, np.uint8)).attrs["value"]

for line in sys.stdin:
    jobs = [job for job in json.loads(line)]
    pids = []
    pipes = []
    for job in jobs:
        get, put = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                won = write(*job["args"])
                os.write(put, json.dumps(won).encode())
            finally:
                os._exit(0)
        os.close(put)
        pids.append(pid)
        pipes.append(get)
    begun = time.time()
    if "kill_after" in jobs[0]:
        time.sleep(jobs[0]["kill_after"])
        os.kill(pids[0], signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    said = [os.read(pipe, 1000).decode() for pipe in pipes]
    print(json.dumps([said, time.time() - begun]), flush=True)
"""


@pytest.fixture(scope="module")
def nursery() -> Iterator[Callable[..., tuple[list[str], float]]]:
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin
    assert process.stdout

    def run(*jobs: dict) -> tuple[list[str], float]:
        print(json.dumps(jobs), file=process.stdin, flush=True)
        said, seconds = json.loads(process.stdout.readline())  # type: ignore[union-attr]
        return said, seconds

    yield run
    process.stdin.close()
    process.wait()


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return create_store(tmp_path / "store", SPEC)


def check_whole(store: FeatureStore, slide_id: str) -> float:
    """The one value that every row of the slide has."""
    value = store.record(slide_id).attrs["value"]
    features = store.features(slide_id)
    assert features.shape == (N, DIM)
    assert (features == value).all()
    assert (store.coords(slide_id) == value).all()
    return value


def test_a_killed_writer_leaves_the_whole_slide_or_none(
    store: FeatureStore, nursery: Callable[..., tuple[list[str], float]]
) -> None:
    _, usual = nursery({"args": [str(store.path), "first", 1, N, 0]})
    rng = np.random.default_rng(0)
    whole = 0
    for i in range(30):
        slide_id = f"killed/{i}"
        nursery({"args": [str(store.path), slide_id, 1, N, 0],
                 "kill_after": usual * rng.uniform(0.1, 1.2)})  # fmt: skip
        fresh = open_store(store.path)
        if fresh.is_done(slide_id):
            whole += 1
            check_whole(fresh, slide_id)
        else:
            assert slide_id not in fresh.slide_ids()
            with pytest.raises(StoreError, match="not in the store"):
                fresh.features(slide_id)
            nursery({"args": [str(store.path), slide_id, 2, N, 0]})
            assert check_whole(open_store(store.path), slide_id) == 2
    assert whole < 30, "no kill fell before the commit: the test has lost its aim"
    assert store.sweep(0, delete=True)
    assert all(finding.ok for finding in open_store(store.path).verify())
    assert len(store.slide_ids()) == 31


def test_of_two_racing_writers_one_wins_whole(
    store: FeatureStore, nursery: Callable[..., tuple[list[str], float]]
) -> None:
    _, usual = nursery({"args": [str(store.path), "first", 1, N, 0]})
    rng = np.random.default_rng(1)
    for i in range(15):
        slide_id = f"race{i}"
        args = [str(store.path), slide_id]
        jobs: list[dict] = [{"args": [*args, value, N, 0]} for value in (1, 2)]
        if i % 3 == 2:
            jobs[0]["kill_after"] = usual * rng.uniform(0.1, 1.5)
        said, _ = nursery(*jobs)
        value = check_whole(open_store(store.path), slide_id)
        if "kill_after" in jobs[0]:
            assert said[0] in ("", str(value))
            store.sweep(0, delete=True)
        else:
            assert said[0] == str(value)
        assert said[1] == str(value)
        assert len(list((store.path / "slides" / slide_id).glob("*"))) == 2
    assert all(finding.ok for finding in open_store(store.path).verify())


def write(store: FeatureStore, slide_id: str, n: int, most_shard_rows: int = 512) -> None:
    with SlideWriter(store.path, store.spec, slide_id, n, {"value": 1}, most_shard_rows) as writer:
        writer.append(np.ones((n, DIM), np.float16))
        writer.commit(np.ones((n, 2), np.int32), np.zeros(n, np.uint8))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = [MOUNT, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs; the file-size limit is tested instead")
    yield folder
    subprocess.run([UMOUNT, str(folder)], check=True)


def test_a_full_disk_is_told_and_leaves_nothing(small_disk: Path) -> None:
    store = create_store(small_disk / "store", SPEC)
    write(store, "fits", N)
    for n in (5000, 20_000):
        with pytest.raises(StoreError) as caught:
            write(store, "large", n)
        assert "No space left" in caught.value.what
        assert "'large'" in caught.value.what
        assert "MiB free" in caught.value.what
        assert str(small_disk) in caught.value.what
        assert not list((store.path / "slides" / "large").iterdir())
    assert open_store(store.path).slide_ids() == ["fits"]
    assert all(finding.ok for finding in store.verify())
    write(store, "fits too", 1000)


@pytest.mark.slow
def test_a_disk_that_fills_up_while_committing_leaves_nothing(small_disk: Path) -> None:
    store = create_store(small_disk / "store", SPEC)
    ballast = small_disk / "ballast"
    told = refused = 0
    for free_kib in (4, 8, 12, 16, 20, 24, 28, 32, 60, 300):
        with SlideWriter(store.path, store.spec, "s", 100, {}) as writer:
            writer.append(np.ones((100, DIM), np.float16))
            status = os.statvfs(small_disk)
            ballast.write_bytes(bytes(max(0, status.f_bavail * status.f_bsize - free_kib * 1024)))
            try:
                writer.commit(np.ones((100, 2), np.int32), np.zeros(100, np.uint8))
            except StoreError as error:
                told += "No space left" in error.what
        ballast.unlink()
        whole = store.slide_ids() == ["s"]
        assert len(list((store.path / "slides" / "s").iterdir())) == 2 * whole
        if whole:
            assert next(store.verify()).ok
            store.drop("s")
        else:
            refused += 1
    assert 0 < told == refused < 10


def test_a_read_only_disk_is_told_and_can_be_read(small_disk: Path) -> None:
    store = create_store(small_disk / "store", SPEC)
    write(store, "s", 10)
    subprocess.run([MOUNT, "-o", "remount,ro", str(small_disk)], check=True)
    store = create_store(small_disk / "store", SPEC)
    assert store.features("s").shape == (10, DIM)
    assert next(store.verify()).ok
    for act in (
        lambda: write(store, "t", 10),
        lambda: store.drop("s"),
        lambda: create_store(small_disk / "other", SPEC),
    ):
        with pytest.raises(StoreError, match="Read-only file system"):
            act()


def test_a_file_size_limit_is_told_and_leaves_nothing(store: FeatureStore) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StoreError, match="File too large"):
            write(store, "s", 5 * N, most_shard_rows=4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((store.path / "slides" / "s").iterdir())
    write(store, "s", N)
    assert check_whole(store, "s") == 1


@pytest.mark.slow
def test_two_processes_may_make_one_store(tmp_path: Path) -> None:
    code = (
        "import sys, time; from hmil_fast.io.store import StoreSpec, create_store;"
        "spec = StoreSpec(64, 'float16', {'name': 'toy'}, {'mpp': 0.5});"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()));"
        "print(create_store(sys.argv[1], spec).uuid)"
    )
    at = str(time.time() + 1)
    commands = [[sys.executable, "-c", code, str(tmp_path / "store"), at] for _ in range(3)]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
    uuids = {process.communicate()[0].strip() for process in processes}
    assert uuids == {open_store(tmp_path / "store").uuid}
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["slides", "store.json"]
