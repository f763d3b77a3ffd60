"""Round trips, refusals, escaping, sweeping: the store as its users see it."""

import json
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from hmil_fast.errors import StoreError
from hmil_fast.io.store import (
    FeatureStore,
    SlideRecord,
    SlideWriter,
    StoreSpec,
    create_store,
    open_store,
    slide_dirname,
)

DIM = 16
SPEC = StoreSpec(DIM, "float16", {"name": "toy", "sha256": "0" * 64}, {"tile_px": 256, "mpp": 0.5})


def rows(n: int, spec: StoreSpec = SPEC, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(n, spec.dim)).astype(np.float32)
    if spec.dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(spec.stored_dtype)


def put(
    store: FeatureStore,
    slide_id: str,
    features: np.ndarray,
    status: np.ndarray | None = None,
    most_shard_rows: int = 65_536,
    files: dict[str, bytes] | None = None,
) -> SlideRecord:
    n = len(features)
    status = np.zeros(n, np.uint8) if status is None else status
    writer = SlideWriter(store.path, store.spec, slide_id, n, {"mpp": 0.25}, most_shard_rows)
    with writer:
        for start in range(0, n, 37):
            writer.append(features[start : start + 37])
        return writer.commit(coords(n), status, files)


def coords(n: int) -> np.ndarray:
    return np.stack([np.arange(n), np.arange(n) * 7], axis=1).astype(np.int64)


def attempts(store: FeatureStore, slide_id: str) -> list[Path]:
    return sorted((store.path / "slides" / slide_dirname(slide_id)).glob("a-*"))


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return create_store(tmp_path / "store", SPEC)


SHARD = 1024  # two chunks of 512


@pytest.mark.parametrize(
    "n", [0, 1, 7, 8, 9, 511, 512, 513, SHARD, SHARD + 1, 2 * SHARD, 2 * SHARD + 1]
)
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_a_slide_comes_back_as_it_went_in(tmp_path: Path, n: int, dtype: str) -> None:
    spec = replace(SPEC, dtype=dtype)
    store = create_store(tmp_path, spec)
    features = rows(n, spec)
    record = put(store, "s", features, most_shard_rows=SHARD, files={"thumbnail.jpg": b"\xff\xd8"})

    store = open_store(tmp_path)
    assert store.features("s").dtype == spec.stored_dtype
    np.testing.assert_array_equal(store.features("s"), features)
    np.testing.assert_array_equal(store.coords("s"), coords(n))
    assert store.coords("s").dtype == np.int32
    np.testing.assert_array_equal(store.status("s"), np.zeros(n, np.uint8))
    assert store.file("s", "thumbnail.jpg") == b"\xff\xd8"
    assert store.file("s", "label.jpg") is None
    assert store.record("s") == record
    assert (record.num_tiles, record.dim, record.attrs) == (n, DIM, {"mpp": 0.25})
    assert [finding.ok for finding in store.verify()] == [True]

    group = zarr.open_group(attempts(store, "s")[0], mode="r")
    array = group["features"]
    assert isinstance(array, zarr.Array)
    np.testing.assert_array_equal(array[:], features)
    assert array.attrs["dtype_logical"] == dtype
    np.testing.assert_array_equal(group["coords"][:], coords(n))  # type: ignore[index]
    assert {name for name, _ in group.members()} == {"features", "coords", "status", "files"}


def test_content_digest_knows_the_rows_and_not_the_layout(tmp_path: Path) -> None:
    features = rows(SHARD + 1)
    digests = []
    for i, most in enumerate((SHARD, 65_536)):
        store = create_store(tmp_path / str(i), SPEC)
        digests.append(put(store, "s", features, most_shard_rows=most).content_digest)
    store = create_store(tmp_path / "other", SPEC)
    other = put(store, "s", rows(SHARD + 1, seed=1)).content_digest
    assert digests[0] == digests[1] != other


def test_packed_reading_lays_bags_end_to_end(store: FeatureStore) -> None:
    slides = {f"s{n}": rows(n, seed=n) for n in (2100, 0, 5, 130)}
    for slide_id, features in slides.items():
        put(store, slide_id, features, most_shard_rows=SHARD)
    order = ["s5", "s2100", "s0", "s130", "s5"]
    out = np.full((2300, DIM), 7, np.float16)
    for threads in (1, 3):
        x, bags = store.read_packed(order, out, threads)
        assert np.shares_memory(x, out)
        assert bags.tolist() == [[0, 5], [5, 2100], [2105, 0], [2105, 130], [2235, 5]]
        np.testing.assert_array_equal(x, np.concatenate([slides[name] for name in order]))
        assert (out[len(x) :] == 7).all()
    x, bags = store.read_packed([])
    assert x.shape == (0, DIM)
    assert bags.shape == (0, 2)


@pytest.mark.parametrize(
    "out",
    [
        np.empty((99, DIM), np.float16),
        np.empty((100, DIM), np.float32),
        np.empty((100, 2 * DIM), np.float16)[:, ::2],
        np.frombuffer(bytes(100 * DIM * 2), np.float16).reshape(100, DIM),
    ],
    ids=["short", "dtype", "strided", "read-only"],
)
def test_an_array_that_does_not_fit_is_refused(store: FeatureStore, out: np.ndarray) -> None:
    put(store, "s", rows(100))
    with pytest.raises(StoreError, match="out is"):
        store.read_packed(["s"], out)
    with pytest.raises(StoreError, match="out is"):
        store.features("s", out)


def test_rows_of_bad_tiles_are_stored_as_zeros(store: FeatureStore) -> None:
    features = rows(3 * SHARD)
    status = np.zeros(len(features), np.uint8)
    bad = [0, 5, SHARD, 3 * SHARD - 1]  # in written shards and in the buffer
    status[bad] = 3
    features[5] = np.nan
    features[-1] = np.inf
    record = put(store, "s", features, status, most_shard_rows=SHARD)
    assert sum(o.key.startswith("features/c/") for o in record.objects) == 3
    features[bad] = 0
    np.testing.assert_array_equal(store.features("s"), features)
    np.testing.assert_array_equal(store.status("s"), status)
    assert next(store.verify()).ok


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(tmp_path: Path, dtype: str, value: float) -> None:
    store = create_store(tmp_path, replace(SPEC, dtype=dtype))
    features = rows(600, store.spec)
    bits = np.array([value], np.float32)
    features[417, 3] = (bits.view(np.uint32) >> 16)[0] if dtype == "bfloat16" else value
    with pytest.raises(StoreError, match=r"'s'.*row 417"):
        put(store, "s", features)
    assert store.slide_ids() == []
    assert attempts(store, "s") == []


def test_the_largest_finite_values_are_kept(tmp_path: Path) -> None:
    for dtype, top in (("float16", 0x7BFF), ("bfloat16", 0x7F7F)):
        store = create_store(tmp_path / dtype, replace(SPEC, dtype=dtype))
        features = np.full((9, DIM), top, np.uint16).view(store.spec.stored_dtype)
        put(store, "s", features)
        np.testing.assert_array_equal(store.features("s"), features)


@pytest.mark.parametrize(
    ("features", "why"),
    [
        (np.zeros((3, DIM + 1), np.float16), "dim 16"),
        (np.zeros(DIM, np.float16), "dim 16"),
        (np.zeros((3, DIM), np.float32), "float32"),
        (np.zeros((11, DIM), np.float16), "11 rows appended of 10"),
    ],
)
def test_rows_of_the_wrong_kind_are_refused(
    store: FeatureStore, features: np.ndarray, why: str
) -> None:
    with pytest.raises(StoreError, match=why), store.writer("s", 10, {}) as writer:
        writer.append(features)
    assert attempts(store, "s") == []


def test_commit_wants_every_row_and_sound_coords(store: FeatureStore) -> None:
    good = {"coords": coords(10), "status": np.zeros(10, np.uint8)}
    for wrong, why in (
        ({"coords": coords(9)}, "coords"),
        ({"coords": coords(10).astype(float)}, "coords"),
        ({"coords": coords(10) + 2**31}, "coords"),
        ({"status": np.zeros(9, np.uint8)}, "status"),
        ({"status": np.full(10, 256)}, "status"),
        ({"files": {"../x": b""}}, "extra file"),
        ({"files": {"a/b": b""}}, "extra file"),
        ({"files": {".zarray": b""}}, "extra file"),
    ):
        writer = store.writer("s", 10, {})
        writer.append(rows(10))
        with pytest.raises(StoreError, match=why):
            writer.commit(**{**good, **wrong})  # type: ignore[arg-type]
        assert attempts(store, "s") == []
    writer = store.writer("s", 10, {})
    writer.append(rows(9))
    with pytest.raises(StoreError, match="9 rows"):
        writer.commit(coords(10), good["status"])
    with pytest.raises(StoreError, match="closed"):
        writer.append(rows(1))


def test_numbers_from_numpy_are_numbers(tmp_path: Path) -> None:
    store = create_store(tmp_path, replace(SPEC, dim=np.int64(DIM)))
    with store.writer("s", np.int64(3), {}) as writer:  # type: ignore[arg-type]
        writer.append(rows(3))
        writer.commit(coords(3), np.zeros(3, np.int64), {"empty.txt": b""})
    assert open_store(tmp_path).features("s").shape == (3, DIM)
    assert store.file("s", "empty.txt") == b""


def test_leaving_without_commit_leaves_nothing(store: FeatureStore) -> None:
    with store.writer("s", 10, {}) as writer:
        writer.append(rows(3))
        assert attempts(store, "s")
    assert attempts(store, "s") == []
    assert not store.is_done("s")


def test_done_slides_are_known_and_never_overwritten(store: FeatureStore) -> None:
    assert not store.is_done("s")
    first = put(store, "s", rows(20))
    assert store.is_done("s")
    assert open_store(store.path).is_done("s")
    second = put(store, "s", rows(20, seed=1))
    assert second == first
    assert len(attempts(store, "s")) == 1
    np.testing.assert_array_equal(open_store(store.path).features("s"), rows(20))


def test_another_configuration_is_refused(store: FeatureStore) -> None:
    put(store, "s", rows(20))
    other = FeatureStore(store.path, replace(SPEC, tiling={"mpp": 1.0}), store.uuid)
    for use in (other.is_done, other.features, other.record):
        with pytest.raises(StoreError, match=r"'s' was committed with configuration"):
            use("s")
    with pytest.raises(StoreError, match="configuration"):
        other.writer("s", 20, {})
    with pytest.raises(StoreError, match="configuration"):
        put(other, "s", rows(20))
    assert len(attempts(store, "s")) == 1
    assert next(store.verify()).ok


@pytest.mark.parametrize("attrs", [{"mpp": float("nan")}, {"a": [float("inf")]}, {"a": object()}])
def test_attributes_are_strict_json(store: FeatureStore, attrs: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match=r"attrs of slide 's'"):
        store.writer("s", 1, attrs)
    assert attempts(store, "s") == []


HARD_IDS = ["a/b c/ü.svs", "..", ".", ".hidden", "x" * 300, "x" * 301, "~", "%", "%2E", "a\0b",
            "A", "a", "-rf", "con:", "\udcff.svs", "日本" * 100, " "]  # fmt: skip


def test_any_text_is_a_slide_id(store: FeatureStore) -> None:
    for i, slide_id in enumerate(HARD_IDS):
        put(store, slide_id, rows(3, seed=i))
    again = open_store(store.path)
    assert again.slide_ids() == sorted(HARD_IDS)
    for i, slide_id in enumerate(HARD_IDS):
        assert again.record(slide_id).slide_id == slide_id
        np.testing.assert_array_equal(again.features(slide_id), rows(3, seed=i))
    folders = list((store.path / "slides").iterdir())
    assert len(folders) == len(HARD_IDS)
    with pytest.raises(StoreError, match="empty"):
        store.is_done("")


def test_sweep_takes_abandoned_attempts_only(store: FeatureStore) -> None:
    put(store, "done", rows(20))
    slide_dir = store.path / "slides" / "done"
    abandoned = slide_dir / f"a-{uuid.uuid4().hex}.zarr"
    (abandoned / "features").mkdir(parents=True)
    temporary = slide_dir / f".commit.json.{uuid.uuid4().hex}.tmp"
    temporary.write_text("half")
    (slide_dir / "notes.txt").write_text("a person's own file")
    living = store.writer("live", 20, {})
    living.append(rows(5))

    assert store.sweep(3600) == []
    listed = store.sweep(0)
    assert set(listed) == {abandoned, temporary, *attempts(store, "live")}
    assert abandoned.exists()
    assert set(store.sweep(0, delete=True)) == set(listed)
    assert store.sweep(0) == []
    assert (slide_dir / "notes.txt").exists()
    np.testing.assert_array_equal(store.features("done"), rows(20))
    with pytest.raises(StoreError, match="No such file"):
        living.append(rows(15))
    assert store.slide_ids() == ["done"]


def test_a_dropped_slide_can_be_written_again(store: FeatureStore) -> None:
    put(store, "s", rows(20))
    store.drop("s")
    assert not store.is_done("s")
    assert attempts(store, "s") == []
    put(store, "s", rows(20, seed=1))
    np.testing.assert_array_equal(store.features("s"), rows(20, seed=1))
    (store.path / "slides" / "s" / "commit.json").write_text("{")
    store.drop("s")
    assert not store.is_done("s")


def test_info_counts_and_a_missing_slide_is_named(store: FeatureStore) -> None:
    put(store, "a", rows(20))
    put(store, "b", rows(0))
    info = store.info()
    assert (info["slides"], info["tiles"], info["dim"], info["dtype"]) == (2, 20, DIM, "float16")
    files = [p for p in (store.path / "slides").rglob("a-*/**/*") if p.is_file()]
    assert info["bytes"] == sum(p.stat().st_size for p in files)
    assert info["encoder"] == SPEC.encoder
    json.dumps(info, allow_nan=False)
    with pytest.raises(StoreError, match=r"'c' is not in the store"):
        store.features("c")


def test_reading_needs_no_zarr(store: FeatureStore) -> None:
    put(store, "s", rows(2100), most_shard_rows=SHARD, files={"t.jpg": b"x"})
    code = (
        "import sys; from hmil_fast.io.store import open_store; s = open_store(sys.argv[1]);"
        "s.features('s'); s.coords('s'); s.status('s'); s.file('s', 't.jpg'); s.info();"
        "assert all(f.ok for f in s.verify()); assert 'zarr' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(store.path)], check=True)
