"""Damage and malice: what is wrong on disk is reported, and never believed."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from hmil_fast.errors import StoreError
from hmil_fast.io.store import FeatureStore, StoredObject, StoreSpec, create_store, open_store
from hmil_fast.io.store.backend import backend_of

DIM = 16
N = 1100
ROW = 2 * DIM
SPEC = StoreSpec(DIM, "float16", {"name": "toy"}, {"mpp": 0.5})


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float16)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, features: np.ndarray) -> Path:
    store = create_store(tmp_path_factory.mktemp("template"), SPEC)
    for slide_id in ("s", "sound"):
        with store.writer(slide_id, N, {}) as writer:
            writer.append(features)
            writer.commit(np.zeros((N, 2), np.int32), np.zeros(N, np.uint8), {"t.jpg": b"picture"})
    return store.path


@pytest.fixture
def store(tmp_path: Path, template: Path) -> FeatureStore:
    return open_store(shutil.copytree(template, tmp_path / "store"))


def attempt(store: FeatureStore) -> Path:
    (folder,) = (store.path / "slides" / "s").glob("a-*")
    return folder


def rewrite_commit(store: FeatureStore, **changes: object) -> None:
    record = replace(open_store(store.path).record("s"), **changes)  # type: ignore[arg-type]
    (store.path / "slides" / "s" / "commit.json").write_text(record.to_json())


def restate_sizes(store: FeatureStore) -> None:
    """Let the commit tell the sizes that are on disk, as a forger would."""
    folder = attempt(store)
    objects = tuple(
        StoredObject(path.relative_to(folder).as_posix(), path.stat().st_size, 0)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
    rewrite_commit(store, objects=objects)


def edit_meta(store: FeatureStore, edit: Callable[[dict], None], name: str = "features") -> None:
    path = attempt(store) / name / "zarr.json"
    meta = json.loads(path.read_text())
    edit(meta)
    path.write_text(json.dumps(meta))


def test_every_flipped_bit_is_found(store: FeatureStore) -> None:
    shard = attempt(store) / "features/c/0/0"
    whole = shard.read_bytes()
    rng = np.random.default_rng(1)
    found = []
    for _ in range(20):
        data = bytearray(whole)
        place = int(rng.integers(len(data) * 8))
        data[place // 8] ^= 1 << place % 8
        shard.write_bytes(data)
        finding, sound = open_store(store.path).verify()
        assert sound.ok
        assert sound.slide_id == "sound"
        found.append(finding.slide_id == "s" and not finding.ok and "features" in finding.problem)
        with pytest.raises(StoreError, match=r"'s' is damaged"):
            open_store(store.path).features("s")
    assert sum(found) == 20
    shard.write_bytes(whole)
    assert all(finding.ok for finding in store.verify())


@pytest.mark.parametrize("mend", [False, True], ids=["as found", "size restated"])
def test_truncated_shards_are_found(store: FeatureStore, mend: bool) -> None:
    shard = attempt(store) / "features/c/0/0"
    whole = shard.read_bytes()
    for keep in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:keep])
        if mend:
            restate_sizes(store)
        with pytest.raises(StoreError, match="damaged"):
            open_store(store.path).features("s")
        assert not next(store.verify(["s"])).ok


@pytest.mark.parametrize(
    "key",
    ["features/c/0/0", "coords/c/0/0", "status/c/0", "files/t.jpg/c/0", "zarr.json",
     "features/zarr.json", "coords/zarr.json"],
)  # fmt: skip
def test_every_file_matters(store: FeatureStore, key: str) -> None:
    path = attempt(store) / key
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 4
    path.write_bytes(flipped)
    assert not next(store.verify(["s"])).ok
    path.unlink()
    finding = next(store.verify(["s"]))
    assert f"{key} is missing" in finding.problem
    assert "repair" in finding.fix
    path.write_bytes(whole)
    assert next(store.verify(["s"])).ok


def test_a_deleted_chunk_is_an_error_and_not_zeros(store: FeatureStore) -> None:
    (attempt(store) / "features/c/0/0").unlink()
    (attempt(store) / "coords/c/0/0").unlink()
    array = zarr.open_group(attempt(store), mode="r")["features"]
    assert not np.any(array[:])  # type: ignore[index]  # what plain zarr makes of it
    again = open_store(store.path)
    for read in (again.features, again.coords):
        with pytest.raises(StoreError, match="No such file"):
            read("s")


def test_a_lost_attempt_and_a_stranger_are_found(store: FeatureStore) -> None:
    (attempt(store) / "features/c/1").mkdir()
    (attempt(store) / "features/c/1/0").write_bytes(b"x")
    assert "added after" in next(store.verify(["s"])).problem
    shutil.rmtree(attempt(store))
    assert not next(store.verify(["s"])).ok
    assert not next(store.verify(["never extracted"])).ok


def test_a_flipped_bit_in_the_commit_is_found(store: FeatureStore) -> None:
    commit = store.path / "slides" / "s" / "commit.json"
    whole = commit.read_bytes()
    rng = np.random.default_rng(2)
    for _ in range(20):
        data = bytearray(whole)
        place = int(rng.integers(len(data) * 8))
        data[place // 8] ^= 1 << place % 8
        commit.write_bytes(data)
        with pytest.raises(StoreError):
            open_store(store.path).is_done("s")
        assert not next(store.verify(["s"])).ok


def permuted(shard: bytes, order: list[int], chunk_bytes: int, at: str) -> bytes:
    """The same chunks in another order, with a right index."""
    count = len(order)
    stored = np.frombuffer(shard[-(16 * count + 4) : -4], "<u8").reshape(count, 2)
    index = np.empty((count, 2), "<u8")
    body = b""
    base = 16 * count + 4 if at == "start" else 0
    for i in order:
        start = int(stored[i, 0])
        body += b"gap"  # chunks need not touch either
        index[i] = base + len(body), chunk_bytes
        body += shard[start : start + chunk_bytes]
    tail = index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    return tail + body if at == "start" else body + tail


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0], [2, 1, 0], [0, 1, 2]])
def test_the_shard_index_is_honoured(
    store: FeatureStore, features: np.ndarray, at: str, order: list[int]
) -> None:
    shard = attempt(store) / "features/c/0/0"
    chunk = 368  # 8·ceil(1100/3/8)
    shard.write_bytes(permuted(shard.read_bytes(), order, chunk * ROW + 4, at))
    edit_meta(store, lambda meta: meta["codecs"][0]["configuration"].update(index_location=at))
    restate_sizes(store)
    np.testing.assert_array_equal(open_store(store.path).features("s"), features)
    array = zarr.open_group(attempt(store), mode="r")["features"]
    np.testing.assert_array_equal(array[:], features)  # type: ignore[index]


@pytest.mark.parametrize("layout", ["zstd", "big-endian", "column chunks", "bare chunks"])
def test_other_layouts_are_read_by_zarr(
    store: FeatureStore, features: np.ndarray, layout: str
) -> None:
    from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

    folder = attempt(store)
    shutil.rmtree(folder / "features")
    zarr.open_group(folder, mode="r+").create_array(
        "features",
        data=features,
        chunks={"column chunks": (512, DIM // 2)}.get(layout, (512, DIM)),
        shards=None if layout == "bare chunks" else (1536, DIM),
        serializer=BytesCodec(endian="big" if layout == "big-endian" else "little"),
        compressors=[ZstdCodec()] if layout == "zstd" else [Crc32cCodec()],
    )
    restate_sizes(store)
    again = open_store(store.path)
    np.testing.assert_array_equal(again.features("s"), features)
    np.testing.assert_array_equal(again.read_packed(["sound", "s"])[0][N:], features)
    np.testing.assert_array_equal(again.read_rows("s", 500, 1030), features[500:1030])


def lie_shape(meta: dict) -> None:
    meta["shape"][0] = 2**31 - 1


def lie_chunk(meta: dict) -> None:
    lie_shape(meta)
    meta["chunk_grid"]["configuration"]["chunk_shape"][0] = 2**40
    meta["codecs"][0]["configuration"]["chunk_shape"][0] = 2**40


def lie_zstd(meta: dict) -> None:
    lie_chunk(meta)
    meta["codecs"][0]["configuration"]["codecs"].append({"name": "zstd"})


@pytest.mark.parametrize("lie", [lie_shape, lie_chunk, lie_zstd])
def test_files_that_claim_too_much_allocate_nothing(
    store: FeatureStore, lie: Callable[[dict], None]
) -> None:
    edit_meta(store, lie)
    restate_sizes(store)
    rewrite_commit(store, num_tiles=2**31 - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (store.features, open_store(store.path).features):
        store._readers.clear()
        with pytest.raises(StoreError, match="damaged"):
            read("s")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(shape=[]),
        lambda m: m.update(shape=[-1, DIM]),
        lambda m: m.update(shape=[1e999, DIM]),
        lambda m: m.update(shape="x"),
        lambda m: m.update(data_type="object"),
        lambda m: m.update(codecs=[]),
        lambda m: m.update(codecs={}),
        lambda m: m.pop("chunk_grid"),
        lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[0, DIM]),
        lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[]),
        lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[8, DIM]),
        lambda m: m["codecs"][0]["configuration"].update(chunk_shape=[0, DIM]),
    ],
)
def test_nonsense_in_metadata_is_damage(store: FeatureStore, edit: Callable[[dict], None]) -> None:
    edit_meta(store, edit)
    restate_sizes(store)
    with pytest.raises(StoreError, match="damaged"):
        open_store(store.path).features("s")
    assert not next(store.verify(["s"])).ok


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"attempt": ".."}, "attempt"),
        ({"attempt": "../../../etc"}, "attempt"),
        ({"objects": (StoredObject("../../../x", 1, 0),)}, "object"),
        ({"objects": (StoredObject("/etc/passwd", 1, 0),)}, "object"),
        ({"objects": (StoredObject("features//c", 1, 0),)}, "object"),
        ({"objects": (StoredObject("features/c/0/0", -1, 0),)}, "object"),
        ({"num_tiles": -1}, "-1 tiles"),
        ({"num_tiles": 2**40}, "tiles"),
        ({"num_tiles": N + 1}, "features are"),
        ({"dim": DIM + 1}, "dim 17"),
        ({"dtype": "float32"}, "float32"),
        ({"slide_id": "another"}, "another"),
    ],
)
def test_commits_that_lie_are_refused(
    store: FeatureStore, changes: dict[str, object], why: str
) -> None:
    rewrite_commit(store, **changes)
    with pytest.raises(StoreError, match=why):
        open_store(store.path).features("s")
    assert not next(store.verify(["s"])).ok


def test_a_shard_index_needs_its_own_checksum(store: FeatureStore) -> None:
    shard = attempt(store) / "features/c/0/0"
    data = bytearray(shard.read_bytes())
    index = np.frombuffer(data, "<u8", count=6, offset=len(data) - 52).reshape(3, 2)
    index[[0, 1]] = index[[1, 0]]  # two whole chunks change places: their own checksums are right
    shard.write_bytes(data)
    with pytest.raises(StoreError, match="shard index"):
        open_store(store.path).features("s")


@pytest.mark.parametrize("name", ["status", "coords"])
def test_rows_that_do_not_match_the_features_are_damage(store: FeatureStore, name: str) -> None:
    edit_meta(store, lambda meta: meta["shape"].__setitem__(0, N - 1), name)
    restate_sizes(store)
    with pytest.raises(StoreError, match=f"'{name}' is"):
        getattr(open_store(store.path), name)("s")
    rewrite_commit(
        store,
        objects=tuple(
            replace(o, crc32c=backend_of(store.path).crc32c_of(attempt(store) / o.key))
            for o in open_store(store.path).record("s").objects
        ),
    )
    assert f"'{name}' is" in next(store.verify(["s"])).problem


def test_links_and_pipes_are_not_followed(store: FeatureStore, tmp_path: Path) -> None:
    folder = attempt(store)
    secret = tmp_path / "secret"
    (folder / "features").rename(secret)
    (folder / "features").symlink_to(secret)
    with pytest.raises(StoreError, match="leads out"):
        open_store(store.path).features("s")
    (folder / "features").unlink()
    secret.rename(folder / "features")
    shard = folder / "features/c/0/0"
    shard.rename(secret)
    shard.symlink_to(secret)
    restate_sizes(store)
    with pytest.raises(StoreError, match="a link, a folder, a pipe or a device"):
        open_store(store.path).features("s")
    (folder / "coords/zarr.json").rename(tmp_path / "zarr.json")
    (folder / "coords/zarr.json").symlink_to(tmp_path / "zarr.json")
    with pytest.raises(StoreError, match="symbolic links"):
        open_store(store.path).coords("s")
    (folder / "coords/zarr.json").unlink()
    os.mkfifo(folder / "coords/zarr.json")
    with pytest.raises(StoreError, match="not a regular file"):
        open_store(store.path).coords("s")
