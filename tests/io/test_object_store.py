"""Stores in an object store: a real S3 server in another process, and servers that misbehave."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hmil_fast.errors import StoreError, UsageError
from hmil_fast.io.store import FeatureStore, StoreSpec, create_store, open_store, slide_dirname
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.location import ObjectUrl, location
from hmil_fast.io.store.writer import SlideWriter

SPEC = StoreSpec(16, "float16", {"name": "toy"}, {"tile_px": 256, "mpp": 0.5})
STRANGE = ("a/b", "../x", "~", "µ [red] %2F?#", ".hidden", "x" * 300, "s\n\t\\ \u202e")

RACER = """
import sys
import numpy as np
from hmil_fast.io.store import SlideWriter, open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
for slide_id in sys.argv[3:]:
    sys.stdin.readline()
    with SlideWriter(store.path, store.spec, slide_id, 3, {"by": sys.argv[2]}) as writer:
        writer.append(np.full((3, 16), int(sys.argv[2]), np.float16))
        record = writer.commit(np.zeros((3, 2), np.int32), np.zeros(3, np.uint8))
    print(record.attrs["by"], flush=True)
"""


def fill(store: FeatureStore, slide_id: str, n: int, shard: int = 65_536) -> None:
    rng = np.random.default_rng(n)
    with SlideWriter(store.path, store.spec, slide_id, n, {}, shard) as writer:
        writer.append(rng.standard_normal((n, 16), np.float32).astype(np.float16))
        coords = rng.integers(0, 9999, (n, 2))
        writer.commit(coords, rng.integers(0, 2, n), {"thumbnail.jpg": b"jpeg"})


def find(store: FeatureStore, slide_id: str, key: str) -> ObjectUrl:
    slide = store.path / "slides" / slide_dirname(slide_id)
    assert isinstance(slide, ObjectUrl)
    return slide / store.record(slide_id).attempt / key


@pytest.mark.parametrize("n", [0, 1, 513, 3000])
def test_it_holds_what_a_folder_holds(s3: str, tmp_path: Path, n: int) -> None:
    there, here = create_store(s3, SPEC), create_store(tmp_path / "store", SPEC)
    for store in (there, here):
        fill(store, "s", n, 1024)
    there = open_store(s3)
    one, two = there.record("s"), here.record("s")
    assert one.content_digest == two.content_digest
    assert one.objects == two.objects
    np.testing.assert_array_equal(there.features("s"), here.features("s"))
    np.testing.assert_array_equal(there.coords("s"), here.coords("s"))
    np.testing.assert_array_equal(there.status("s"), here.status("s"))
    np.testing.assert_array_equal(there.read_rows("s", n // 3, n), here.read_rows("s", n // 3, n))
    assert there.file("s", "thumbnail.jpg") == b"jpeg"
    assert all(finding.ok for finding in there.verify())
    assert there.info()["bytes"] == here.info()["bytes"]


def test_ids_of_any_characters(s3: str) -> None:
    store = create_store(s3, SPEC)
    for n, slide_id in enumerate(STRANGE):
        fill(store, slide_id, n)
    found = open_store(s3)
    assert found.slide_ids() == sorted(STRANGE)
    assert [found.record(slide_id).num_tiles for slide_id in STRANGE] == list(range(len(STRANGE)))
    x, bags = found.read_packed(STRANGE)
    assert bags[:, 1].tolist() == list(range(len(STRANGE)))
    assert len(x) == bags[:, 1].sum()
    for slide_id in STRANGE[1:]:  # as it reads layouts that are not its own
        by_zarr = found._reader(slide_id)._by_zarr("features", slice(0, 5))
        np.testing.assert_array_equal(by_zarr, found.features(slide_id)[:5])
    found.drop(STRANGE[3])
    assert open_store(s3).slide_ids() == sorted({*STRANGE} - {STRANGE[3]})
    assert found.sweep(0) == []


def test_another_spec_and_no_store_are_told(s3: str) -> None:
    with pytest.raises(StoreError, match="no feature store at s3://"):
        open_store(s3)
    create_store(s3, SPEC)
    with pytest.raises(StoreError, match="dim"):
        create_store(s3 + "/", StoreSpec(8, "float16", {"name": "toy"}, dict(SPEC.tiling)))
    with pytest.raises(UsageError, match="is not a store"):
        location("ftp://somewhere/x")


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(StoreError, match="needs the package obstore") as error:
        open_store("s3://cohort/without")
    assert "hmil-fast[objects]" in error.value.fix


def test_of_two_writers_one_wins_and_the_other_leaves_nothing(s3: str) -> None:
    store = create_store(s3, SPEC)
    slides = [f"s{number}" for number in range(8)]
    pipe = subprocess.PIPE
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, s3, str(number), *slides],
            stdin=pipe,
            stdout=pipe,
            text=True,
        )
        for number in (1, 2)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for slide_id in slides:
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write("\n")
                racer.stdin.flush()
            said = {racer.stdout.readline().strip() for racer in racers if racer.stdout}
            (winner,) = said
            assert (open_store(s3).features(slide_id) == int(winner)).all()
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert all(finding.ok for finding in store.verify())
    assert store.sweep(0) == []


def test_a_writer_that_gave_up_or_was_killed_leaves_what_sweep_takes(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = create_store(s3, SPEC)
    with store.writer("s", 3, {}) as writer:
        writer.append(np.zeros((2, 16), np.float16))
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    fill(store, "s", 3)
    assert list(tmp_path.iterdir()) == []
    slide = store.path / "slides" / slide_dirname("s")
    attempt = slide / f"a-{'0' * 32}.zarr"
    backend_of(attempt).replace(attempt / "features/c/0/0", b"half")
    assert store.sweep(3600) == []
    assert store.sweep(0, delete=True) == [attempt]
    assert backend_of(slide).names(slide) == [store.record("s").attempt, "commit.json"]
    assert all(finding.ok for finding in store.verify())


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "added"])
def test_verify_says_which_object_is_damaged(s3: str, damage: str) -> None:
    store = create_store(s3, SPEC)
    fill(store, "good", 20)
    fill(store, "bad", 600)
    key = "features/c/0/0"
    shard = find(store, "bad", key)
    data = bytearray(backend_of(shard).read_bytes(shard, 2**20))
    if damage == "flipped":
        data[5000] ^= 1
        backend_of(shard).replace(shard, bytes(data))
    elif damage == "cut":
        backend_of(shard).replace(shard, bytes(data[:-7]))
    elif damage == "gone":
        backend_of(shard).unlink(shard)
    else:
        backend_of(shard).replace(shard.with_name("1"), b"x")
    found = {finding.slide_id: finding for finding in open_store(s3).verify()}
    assert found["good"].ok
    assert not found["bad"].ok
    assert "features/c/0/" in found["bad"].problem
    assert str(shard.parent.parent.parent.parent) in found["bad"].problem
    if damage != "added":
        with pytest.raises(StoreError, match="'bad' is damaged"):
            open_store(s3).features("bad")


class Odd(BaseHTTPRequestHandler):
    """A small S3 server with a fault."""

    objects: dict[str, bytes]
    fault: str
    faults: int

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.fault == "busy" and self._strikes():
            self._say(503)
        elif self.headers["If-None-Match"] and self.fault != "careless":
            if self.path in self.objects:
                self._say(412)
            else:
                self.objects[self.path] = data
                if self.fault == "lost reply" and "commit" in self.path and self._strikes():
                    self.close_connection = True
                    return
                self._say(200)
        else:
            self.objects[self.path] = data
            self._say(200)

    def _strikes(self) -> bool:
        type(self).faults -= 1
        return self.faults >= 0

    def do_GET(self) -> None:
        data = self.objects.get(self.path)
        self._say(404 if data is None else 200, data or b"")

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        self.objects.pop(self.path, None)
        self._say(204)

    do_POST = do_DELETE

    def _say(self, code: int, data: bytes = b"") -> None:
        self.send_response(code)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Sun, 22 Nov 2026 12:00:00 GMT")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def odd(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ObjectUrl]]:
    running = []

    def start(fault: str) -> ObjectUrl:
        handler = type("Handler", (Odd,), {"objects": {}, "fault": fault, "faults": 1})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        return ObjectUrl(f"s3://bucket/{fault}".replace(" ", "-"))

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_a_server_without_conditional_writes_is_refused(odd: Callable[..., ObjectUrl]) -> None:
    url = odd("careless")
    with pytest.raises(StoreError, match="does not make writes conditional") as error:
        create_store(url, SPEC)
    assert "--store" in error.value.fix


def test_a_commit_whose_reply_was_lost_is_ours(odd: Callable[..., ObjectUrl]) -> None:
    url = odd("lost reply")
    backend_of(url).check(url, writing=True)
    assert backend_of(url).create_exclusive(url / "commit.json", b"ours")
    assert not backend_of(url).create_exclusive(url / "commit.json", b"theirs")
    assert backend_of(url).read_bytes(url / "commit.json", 9) == b"ours"


def test_a_busy_server_is_asked_again(odd: Callable[..., ObjectUrl]) -> None:
    url = odd("busy")
    assert backend_of(url).create_exclusive(url / "x", b"1")
    assert backend_of(url).read_bytes(url / "x", 9) == b"1"
    with pytest.raises(StoreError, match="more than the 0 allowed"):
        backend_of(url).read_bytes(url / "x", 0)


@pytest.mark.parametrize(
    ("name", "value", "what", "fix"),
    [
        ("AWS_ENDPOINT_URL", "127.0.0.1:5577", "AWS_ENDPOINT_URL is '127.0.0.1:5577'", "http://"),
        ("AWS_ENDPOINT_URL", "", "AWS_ENDPOINT_URL is ''", "http://"),
        ("AWS_ENDPOINT_URL", "http://[bad", "InvalidAuthority", "AWS_ENDPOINT_URL"),  # panics
        ("AWS_ALLOW_HTTP", "", "as boolean", "AWS_ALLOW_HTTP"),
    ],
)
def test_a_wrong_environment_is_told(
    s3: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str, what: str, fix: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StoreError) as error:
        open_store(s3)
    assert what in error.value.what
    assert fix in error.value.fix
