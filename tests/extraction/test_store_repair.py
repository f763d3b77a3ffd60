"""`store repair` mends what is damaged, and takes no sound slide with it."""

import json
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest

from hmil_fast.cli.main import main
from hmil_fast.errors import DamagedError, StoreError
from hmil_fast.io.store import FeatureStore, StoreSpec, create_store, open_store, slide_dirname
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.location import location
from hmil_fast.io.store.objects import _client
from hmil_fast.io.store.restore import open_by_slides

SPEC = StoreSpec(
    8, "float16", {"name": "toy", "weights_sha256": "0" * 64}, {"tile_px": 256, "mpp": 0.5}
)
LONG = "日本語" * 30  # only its commit knows this id
IDS = sorted(["a/b", "s1", "s2", "s3", "s4", LONG])
Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("own_signals")


def fill(store: FeatureStore, slide_id: str) -> None:
    rng = np.random.default_rng(len(slide_id))
    with store.writer(slide_id, 40, {"mpp": {"level0": 0.5}}) as writer:
        writer.append(rng.normal(size=(40, 8)).astype(np.float16))
        writer.commit(rng.integers(0, 999, (40, 2)), np.zeros(40, np.uint8))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = create_store(tmp_path_factory.mktemp("template") / "store", SPEC)
    for slide_id in IDS:
        fill(store, slide_id)
    return Path(str(store.path))


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "store")


def repair(path: object, *words: str) -> int:
    return main(["store", "repair", str(path), *words])


def flip(file: Path, place: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


def shard(path: Path, slide_id: str) -> Path:
    store = open_store(path)
    return (
        path
        / "slides"
        / slide_dirname(slide_id)
        / store.record(slide_id).attempt
        / "features/c/0/0"
    )


def without_checksum(path: Path) -> None:
    """As releases before checksums wrote store.json."""
    about = json.loads((path / "store.json").read_text())
    del about["crc32c"]
    (path / "store.json").write_text(json.dumps(about, sort_keys=True, separators=(",", ":")))


@pytest.mark.parametrize("old", [False, True], ids=["with checksum", "without"])
def test_a_flipped_bit_anywhere_in_store_json_costs_no_slide(path: Path, old: bool) -> None:
    file = path / "store.json"
    if old:
        without_checksum(path)
    whole = file.read_bytes()
    before = open_store(path).uuid
    rng = np.random.default_rng(0)
    found = []
    for place in range(len(whole)):
        file.write_bytes(whole)
        flip(file, place, int(rng.integers(8)))
        store, problem = open_by_slides(path)
        assert (store.spec, store.slide_ids()) == (SPEC, IDS), place
        assert not any(finding.damaged for finding in store.verify(["s1"])), place
        if problem:
            found.append(place)
    # all but the notation of numbers, and of an old store what its uuid says
    assert len(found) > len(whole) - 8 - old * len(before)
    for place in found[::25]:
        file.write_bytes(whole)
        flip(file, place)
        assert repair(path) == 0
        store = open_store(path)
        assert (store.spec, store.slide_ids()) == (SPEC, IDS)
    assert all(finding.ok for finding in open_store(path).verify())


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "not JSON", "[]", "another store's"])
def test_store_json_is_restored_from_the_slides(
    path: Path, tmp_path: Path, damage: str, capsys: Capture
) -> None:
    file = path / "store.json"
    whole = file.read_bytes()
    if damage == "another store's":
        other = StoreSpec(16, "float32", {"name": "other"}, {"tile_px": 96, "mpp": 1.0})
        create_store(tmp_path / "other", other)
        shutil.copy(tmp_path / "other" / "store.json", file)
    elif damage == "missing":
        file.unlink()
        with pytest.raises(StoreError, match="no feature store") as refused:
            create_store(path, StoreSpec(16, "float32", {}, {}))  # of another spec than the slides
        assert f"store repair {path}" in refused.value.fix
    else:
        file.write_bytes({"empty": b"", "cut": whole[:-9], "not JSON": b"x", "[]": b"[]"}[damage])
    for command in ("info", "verify"):
        assert main(["store", command, str(path)]) == 1
        out, err = capsys.readouterr()
        assert "store.json is damaged" in err
        assert f"store repair {path}" in err
        assert "6 slides checked, 0 damaged" in out or json.loads(out)["slides"] == 6
    assert repair(path) == 0
    assert "Restored from what the slides say" in capsys.readouterr().out
    store = open_store(path)
    assert (store.spec, store.slide_ids()) == (SPEC, IDS)
    assert all(finding.ok for finding in store.verify())
    assert len(list(path.glob("store.json.aside-*"))) == (damage != "missing")


def test_a_damaged_store_without_slides_says_what_to_do(tmp_path: Path, capsys: Capture) -> None:
    create_store(tmp_path, SPEC)
    (tmp_path / "store.json").write_text("{")
    assert repair(tmp_path) == 2
    assert "no readable slide to restore it from" in capsys.readouterr().err
    assert [file.name for file in tmp_path.glob("store*")] == ["store.json"]


def test_slides_that_disagree_restore_nothing(path: Path, tmp_path: Path, capsys: Capture) -> None:
    other = create_store(tmp_path / "other", StoreSpec(8, "float16", {}, {"mpp": 1.0}))
    fill(other, "stranger")
    shutil.copytree(tmp_path / "other/slides/stranger", path / "slides/stranger")
    assert repair(path) == 1  # store.json is that of the other slides
    assert "stranger: left as it is: slide 'stranger' was committed with" in capsys.readouterr().out
    (path / "store.json").unlink()
    assert repair(path) == 2
    assert "2 configurations" in capsys.readouterr().err
    assert len(list((path / "slides").glob("*/commit.json"))) == 7


@contextmanager
def nobody() -> Iterator[None]:
    """As a user who may not read everything, as the superuser may."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65_534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("place", ["shard", "zarr.json", "commit", "attempt", "slide"])
def test_what_may_not_be_read_is_no_damage(template: Path, place: str, capsys: Capture) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = shutil.copytree(template, Path(folder) / "store")
        for entry in (Path(folder), path, *path.rglob("*")):
            entry.chmod(0o777 if entry.is_dir() else 0o666)
        file = shard(path, "s1")
        locked = {"shard": file, "zarr.json": file.parents[3] / "coords/zarr.json",
                  "commit": file.parents[4] / "commit.json", "attempt": file.parents[3],
                  "slide": file.parents[4]}[place]  # fmt: skip
        before = stat.S_IMODE(locked.stat().st_mode)
        locked.chmod(0)
        with nobody():
            assert main(["store", "verify", str(path)]) == 1
            assert "0 damaged, 1 with other problems" in capsys.readouterr().out
            assert repair(path, "--yes") == 1
        locked.chmod(before)
        said = capsys.readouterr().out
        assert "s1: left as it is" in said
        assert "Permission denied" in said
        assert "0 damaged slides dropped" in said
        assert all(finding.ok for finding in open_store(path).verify())


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
@pytest.mark.parametrize("place", ["shard", "commit"])
def test_what_is_no_file_is_left_and_named(
    path: Path, tmp_path: Path, kind: str, place: str, capsys: Capture
) -> None:
    file = shard(path, "s1")
    file = file if place == "shard" else file.parents[4] / "commit.json"
    file.rename(tmp_path / "moved")
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "link":
        file.symlink_to(tmp_path / "moved")
    else:
        file.mkdir()
    for command in ("verify", "info") if place == "commit" else ("verify",):
        assert main(["store", command, str(path)]) == 1
    assert repair(path) == 1
    assert "s1: left as it is" in capsys.readouterr().out
    assert open_store(path).slide_ids() == IDS
    # what the message says to do where the file is lost
    assert main(["store", "drop", str(path), "s1"]) == 0
    assert (tmp_path / "moved").exists()
    fill(open_store(path), "s1")
    assert main(["store", "verify", str(path)]) == 0


def test_more_than_a_few_are_dropped_only_when_asked_for(path: Path, capsys: Capture) -> None:
    harmed = ["a/b", "s1", "s2", LONG]
    for slide_id in harmed:
        flip(shard(path, slide_id), 100)
    assert repair(path) == 1
    said = capsys.readouterr().out
    assert said.count("would be dropped") == 4
    assert "4 of 6 slides are damaged, none was dropped" in said
    assert "--yes" in said
    assert open_store(path).slide_ids() == IDS
    assert repair(path, "--yes") == 0
    assert "4 damaged slides dropped" in capsys.readouterr().out
    assert open_store(path).slide_ids() == sorted({*IDS} - {*harmed})


def test_what_was_dropped_lies_aside_until_it_is_swept(path: Path) -> None:
    file = shard(path, "s1")
    slide, attempt = file.parents[4], file.parents[3]
    flip(file, 100)
    week = 7 * 24 * 3600
    for entry in (*slide.rglob("*"), slide):
        os.utime(entry, (entry.stat().st_mtime - week,) * 2)
    assert repair(path) == 0
    store = open_store(path)
    assert store.sweep(3600) == []  # its files are old, but were set aside just now
    flip(file, 100)
    (aside,) = slide.glob("commit.json.aside-*")
    shutil.copy(aside, slide / "commit.json")
    assert all(finding.ok for finding in open_store(path).verify())  # so it can be undone
    (slide / "commit.json").unlink()
    fill(store, "s1")
    assert set(store.sweep(0, delete=True)) == {aside, attempt}
    assert not attempt.exists()
    assert all(finding.ok for finding in open_store(path).verify())


def test_a_damaged_commit_stops_no_command(path: Path, capsys: Capture) -> None:
    slide = Path(str(open_store(path)._slide_dir(LONG)))
    flip(slide / "commit.json", 50)
    name = f"slides/{slide.name}"
    others = [slide_id for slide_id in IDS if slide_id != LONG]
    assert open_store(path).slide_ids() == others
    assert main(["store", "info", str(path)]) == 1
    said = json.loads(capsys.readouterr().out)
    assert sorted(said["slide_ids"]) == others
    assert "checksum is wrong" in said["problems"][name]
    assert main(["store", "verify", str(path)]) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"{name}: ")
    assert "6 slides checked, 1 damaged" in said
    assert main(["store", "sweep", str(path), "--older-than", "0"]) == 0
    assert main(["store", "export", str(path), str(path / "out"), "--format", "npy"]) == 1
    said = capsys.readouterr().out
    assert "5 slides exported" in said
    assert f"  {name}: " in said
    with pytest.raises(DamagedError):
        open_store(path).is_done(LONG)
    copy = shutil.copytree(path, path.with_name("copy"))
    assert main(["store", "drop", str(copy), name]) == 0
    assert repair(path) == 0
    for store in (path, copy):
        assert main(["store", "verify", str(store)]) == 0
        fill(open_store(store), LONG)
        assert open_store(store).slide_ids() == IDS


def test_a_slide_that_is_linked_in_loses_nothing_outside(
    path: Path, tmp_path: Path, capsys: Capture
) -> None:
    flip(shard(path, "s1"), 100)
    (path / "slides/s1").rename(tmp_path / "outside")
    (path / "slides/s1").symlink_to(tmp_path / "outside")
    before = sorted(tmp_path.joinpath("outside").rglob("*"))
    assert repair(path) == 1
    assert "s1 is a link" in capsys.readouterr().out
    assert sorted(tmp_path.joinpath("outside").rglob("*")) == before


def test_a_file_that_was_added_costs_no_slide(path: Path, capsys: Capture) -> None:
    (shard(path, "s1").parents[3] / "Thumbs.db").write_text("x")
    assert repair(path) == 1
    assert "s1: left as it is: slide 's1' is sound, but Thumbs.db was added" in (
        capsys.readouterr().out
    )


class CutLists(BaseHTTPRequestHandler):
    """Passes requests on to an S3 server; of what it lists, a part is missing."""

    server_place: str

    def do_GET(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection = HTTPConnection(self.server_place)
        connection.request(self.command, self.path, data, dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        if b"<ListBucketResult" in body:
            shard = rb"<Contents>(?:(?!</Contents>).)*features/c/0/0</Key>.*?</Contents>"
            body = re.sub(shard, b"", body, flags=re.DOTALL)
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        size = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", size or "0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def test_a_cut_listing_costs_no_slide(
    s3: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    store = create_store(s3, SPEC)
    for slide_id in IDS:
        fill(store, slide_id)
    handler = type(
        "Handler",
        (CutLists,),
        {"server_place": os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")},
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    place: Any = location(s3)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        _client.cache_clear()
        assert not [key for key in backend_of(place).tree(place) if key.endswith("features/c/0/0")]
        assert repair(s3) == 0
    _client.cache_clear()
    server.shutdown()
    server.server_close()
    assert "0 damaged slides dropped" in capsys.readouterr().out
    assert open_store(s3).slide_ids() == IDS


def test_in_an_object_store(s3: str, capsys: Capture) -> None:
    store: Any = create_store(s3, SPEC)
    for slide_id in IDS:
        fill(store, slide_id)
    place = location(s3)
    bucket, prefix = s3.removeprefix("s3://").split("/", 1)
    attempt = store.path / "slides" / slide_dirname("s1") / store.record("s1").attempt
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for key in ("features/c/0/0", "coords/zarr.json"):
        name = f"{prefix}/{(attempt / key).key}"
        data = client.get_object(Bucket=bucket, Key=name)["Body"].read()
        client.put_object(Bucket=bucket, Key=name, Body=data, StorageClass="GLACIER")
        assert repair(s3) == 1  # the server answers 403
        assert "s1: left as it is" in capsys.readouterr().out
        client.put_object(Bucket=bucket, Key=name, Body=data)
    assert all(finding.ok for finding in open_store(s3).verify())

    whole = backend_of(place).read_bytes(place / "store.json", 2**20)
    backend_of(place).replace(place / "store.json", whole.replace(b'"toy"', b'"tox"'))
    backend_of(attempt).replace(attempt / "features/c/0/0", b"broken")
    assert repair(s3) == 0
    said = capsys.readouterr().out
    assert "Restored from what the slides say" in said
    assert "s1: dropped" in said
    assert open_store(s3).slide_ids() == sorted({*IDS} - {"s1"})
    assert open_store(s3).spec == SPEC
    assert store.sweep(3600) == []
    assert len(store.sweep(0, delete=True)) == 3  # store.json, commit.json and the attempt
    assert main(["store", "verify", s3]) == 0
