"""Feature files of other tools: in, out, in again, nothing lost and nothing overwritten."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from hmil_fast.errors import SlideError, UsageError
from hmil_fast.io.interchange import (
    FORMATS,
    Hints,
    Taken,
    export_slide,
    find_files,
    import_file,
    likely_spec,
)
from hmil_fast.io.store import FeatureStore, create_store

Layout = Callable[..., Path]
HINTS = Hints(encoder="resnet50", mpp={"": 0.2465})
ALL = sorted(FORMATS)
EXPORTED = sorted(name for name, form in FORMATS.items() if form.parts is not None)


def take(source: str, root: Path, path: Path, hints: Hints = HINTS) -> FeatureStore:
    """Import a whole folder, as the command does."""
    files = find_files(FORMATS[source], root)
    store = create_store(path, likely_spec(files, FORMATS[source], hints))
    for slide_id, file in files:
        import_file(store, FORMATS[source], slide_id, file, hints)
    return store


def put(store: FeatureStore, source: str, folder: Path) -> list[Taken]:
    return [
        export_slide(store, FORMATS[source], slide_id, folder, 0.2465)
        for slide_id in store.slide_ids()
    ]


@pytest.mark.parametrize("source", ALL)
def test_features_and_coordinates_arrive_as_they_were(
    source: str, lay_out: Layout, tmp_path: Path
) -> None:
    lay_out(source, tmp_path / "in", "a b")
    store = take(source, tmp_path / "in", tmp_path / "s")
    rng = np.random.default_rng([700, 24, *b"a b"])
    features = rng.standard_normal((700, 24), np.float32).astype(np.float16)
    coords = rng.integers(0, 200, (700, 2)) * 512
    assert store.slide_ids() == ["a b"]
    assert (store.features("a b") == features).all()
    assert (store.coords("a b") == coords).all()
    assert store.spec.dim == 24
    assert store.spec.dtype == ("float16" if source == "stamp" else "float32")
    assert [finding.problem for finding in store.verify() if not finding.ok] == []


@pytest.mark.parametrize(
    ("source", "encoder", "side", "mpp", "where", "verbatim"),
    [
        ("trident", "uni_v1", 512, None, "coords", {"patch_size": 256, "savetodir": "None"}),
        ("clam", "unknown", 256 * 4.0001, None, "coords", {"downsample": [4.0001, 4.0001]}),
        ("stamp", "ctranspath", 256 / 0.2465, 0.2465, "/", {"code_hash": "0badcafe"}),
        ("atlaspatch", "uni_v1", 512, 0.25, "/", {"wsi_path": "/somewhere/a.svs"}),
        ("slide2vec", "uni2", 448, 0.25, "features", {"encoder_level": "tile"}),
    ],
)
def test_what_the_files_say_is_kept(
    source: str,
    encoder: str,
    side: float,
    mpp: float | None,
    where: str,
    verbatim: dict[str, Any],
    lay_out: Layout,
    tmp_path: Path,
) -> None:
    lay_out(source, tmp_path / "in", "a")
    hints = Hints(
        encoder="uni_v1" if source == "atlaspatch" else None,
        mpp={"a": 0.2465} if source == "stamp" else {},
    )
    store = take(source, tmp_path / "in", tmp_path / "s", hints)
    attrs = store.record("a").attrs
    assert store.spec.encoder == {"name": encoder, "dim": 24, "imported_from": source}
    assert attrs["tile_px_level0"] == pytest.approx(side)
    assert attrs.get("mpp", {}).get("level0") == mpp
    assert attrs["imported"]["format"] == source
    assert verbatim.items() <= attrs["imported"]["attrs"][where].items()
    if source in ("trident", "atlaspatch"):
        assert attrs["level0_size"] == [90_000, 80_000]


@pytest.mark.parametrize("target", EXPORTED)
@pytest.mark.parametrize("source", ["trident", "stamp"])
def test_a_round_trip_keeps_the_content_digest(
    source: str, target: str, lay_out: Layout, tmp_path: Path
) -> None:
    lay_out(source, tmp_path / "in", "a")
    lay_out(source, tmp_path / "in", "b", rows=4200)
    store = take(source, tmp_path / "in", tmp_path / "s1", Hints(mpp={"": 0.2465}))
    hints = Hints(mpp={"": 0.2465}, dtype=store.spec.dtype)  # some formats know float32 alone
    assert not any(taken.before for taken in put(store, target, tmp_path / "out"))
    again = take(target, tmp_path / "out", tmp_path / "s2", hints)
    for slide_id in ("a", "b"):
        assert again.record(slide_id).content_digest == store.record(slide_id).content_digest
    if source == target == "trident":
        ours, theirs = again.record("a").attrs, store.record("a").attrs
        assert ours["imported"] == theirs["imported"]
    assert all(taken.before for taken in put(store, target, tmp_path / "out"))


def test_exported_h5_is_contiguous_and_reads_as_its_tool_reads_it(
    lay_out: Layout, tmp_path: Path
) -> None:
    lay_out("trident", tmp_path / "in", "a")
    store = take("trident", tmp_path / "in", tmp_path / "s")
    put(store, "clam", tmp_path / "clam")
    with h5py.File(tmp_path / "clam" / "h5_files" / "a.h5") as file:
        assert file["features"].chunks is None
        assert (file["features"].dtype, file["coords"].dtype) == (np.float32, np.int32)
    with h5py.File(tmp_path / "clam" / "patches" / "a.h5") as file:
        about = dict(file["coords"].attrs)
        assert about["patch_size"] * about["downsample"][0] == 512
    tensor = torch.load(tmp_path / "clam" / "pt_files" / "a.pt", weights_only=True)
    assert (tensor.numpy() == store.features("a")).all()
    put(store, "stamp", tmp_path / "stamp")
    with h5py.File(tmp_path / "stamp" / "a.h5") as file:
        assert file["coords"][:].max() == pytest.approx(store.coords("a").max() * 0.2465)
        assert file.attrs["tile_size_um"] == pytest.approx(512 * 0.2465)


def test_coordinates_may_lie_in_a_folder_of_their_own(lay_out: Layout, tmp_path: Path) -> None:
    lay_out("clam", tmp_path / "clam", "a")
    hints = Hints(coords=tmp_path / "clam" / "patches")
    store = take("pt", tmp_path / "clam", tmp_path / "s", hints)
    assert store.coords("a").max() > 0
    assert store.record("a").attrs["tile_px_level0"] == pytest.approx(256 * 4.0001)
    (tmp_path / "clam" / "patches" / "a.h5").unlink()
    with pytest.raises(SlideError, match="no such file of coordinates"):
        take("pt", tmp_path / "clam", tmp_path / "s2", hints)


def test_features_without_coordinates(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    np.save(tmp_path / "in" / "sub" / "a.npy", np.eye(5, 8))
    store = take("npy", tmp_path / "in", tmp_path / "s", Hints())
    assert store.slide_ids() == ["sub/a"]
    assert store.spec.dtype == "float32"
    assert (store.coords("sub/a") == -1).all()
    with pytest.raises(SlideError, match="has no coordinates"):
        put(store, "trident", tmp_path / "out")
    put(store, "npy", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["sub%2Fa.npy"]
    again = take("npy", tmp_path / "out", tmp_path / "s2", Hints())
    assert again.slide_ids() == ["sub/a"]


def test_bfloat16_tensors(tmp_path: Path) -> None:
    values = torch.randn(20, 8).bfloat16()
    torch.save(values, tmp_path / "a.pt")
    store = take("pt", tmp_path / "a.pt", tmp_path / "s", Hints())
    assert store.spec.dtype == "bfloat16"
    assert (torch.from_numpy(store.features("a")).view(torch.bfloat16) == values).all()
    put(store, "npy", tmp_path / "out")
    assert (np.load(tmp_path / "out" / "a.npy") == values.float().numpy()).all()


def test_slides_without_tiles(lay_out: Layout, tmp_path: Path) -> None:
    lay_out("trident", tmp_path / "in", "z")
    path = lay_out("trident", tmp_path / "in", "none")
    with h5py.File(path, "w") as file:  # of an encoder that does not tell its length
        file["features"], file["coords"] = np.zeros(0), np.zeros((0, 2), int)
        tiling = {"patch_size": 256, "target_magnification": 20, "overlap": 0}
        file["coords"].attrs.update(tiling | {"patch_size_level0": 512})
        file["features"].attrs["encoder"] = "uni_v1"
    store = take("trident", tmp_path / "in", tmp_path / "s", Hints())
    assert store.features("none").shape == (0, 24)
    for target in EXPORTED:
        put(store, target, tmp_path / target)
    assert np.load(tmp_path / "npy" / "none.npy").shape == (0, 24)


def test_odd_rows_are_told_and_kept_out_of_training(tmp_path: Path) -> None:
    rows = np.ones((50, 8), np.float32)
    rows[7, 3] = np.nan
    rows[20:30] = 0
    np.save(tmp_path / "a.npy", rows)
    np.save(tmp_path / "a.coords.npy", np.arange(100).reshape(50, 2))
    hints = Hints()
    store = take("npy", tmp_path / "a.npy", tmp_path / "s", hints)
    taken = import_file(store, FORMATS["npy"], "a", tmp_path / "a.npy", hints)
    assert taken.before
    assert any("1 rows are not finite, such as row 7" in note for note in taken.notes)
    assert any("10 rows are all zeros" in n and "20 to 29" in n for n in taken.notes)
    assert np.flatnonzero(store.status("a")).tolist() == [7]
    assert put(store, "npy", tmp_path / "out")[0].notes == ("1 bad tiles left out",)
    assert (np.load(tmp_path / "out" / "a.npy") == np.delete(rows, 7, 0)).all()
    assert len(np.load(tmp_path / "out" / "a.coords.npy")) == 49


def test_values_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((3, 8), 1e6, np.float32))
    with pytest.raises(SlideError, match="too large for float16"):
        take("npy", tmp_path / "a.npy", tmp_path / "s", Hints(dtype="float16"))
    assert take("npy", tmp_path / "a.npy", tmp_path / "s2", Hints()).features("a").max() == 1e6


@pytest.mark.parametrize("change", ["features", "coords", "rows"])
def test_other_content_under_a_known_name_is_an_error(
    change: str, lay_out: Layout, tmp_path: Path
) -> None:
    path = lay_out("npy", tmp_path / "in", "a")
    store = take("npy", tmp_path / "in", tmp_path / "s", Hints())
    record = store.record("a")
    put(store, "npy", tmp_path / "out")
    features, coords = np.load(path), np.load(tmp_path / "in" / "a.coords.npy")
    features[599, 3] += change == "features"
    coords[599, 1] += change == "coords"
    stop = 699 if change == "rows" else 700
    np.save(path, features[:stop])
    np.save(tmp_path / "in" / "a.coords.npy", coords[:stop])
    with pytest.raises(SlideError, match="slide 'a' is in the store with other content"):
        import_file(store, FORMATS["npy"], "a", path, Hints())
    assert store.record("a") == record
    other = take("npy", tmp_path / "in", tmp_path / "s2", Hints())
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(SlideError, match=r"exists with other content|coordinates of shape"):
        put(other, "npy", tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("source", ["trident", "clam", "stamp", "atlaspatch"])
def test_an_export_with_other_coordinates_is_an_error(
    source: str, lay_out: Layout, tmp_path: Path
) -> None:
    path = lay_out("trident", tmp_path / "in", "a")
    put(take("trident", tmp_path / "in", tmp_path / "s"), source, tmp_path / "out")
    with h5py.File(path, "a") as file:
        file["coords"][650, 1] += 8
    other = take("trident", tmp_path / "in", tmp_path / "s2")
    with pytest.raises(SlideError, match=r"a\.h5 exists with other content"):
        put(other, source, tmp_path / "out")


def test_a_file_of_another_kind_does_not_get_in(lay_out: Layout, tmp_path: Path) -> None:
    lay_out("trident", tmp_path / "in", "a", dim=16)  # the first, yet not what most are
    for name in "bcd":
        lay_out("trident", tmp_path / "in", name)
    files = dict(find_files(FORMATS["trident"], tmp_path / "in"))
    spec = likely_spec(files.items(), FORMATS["trident"], Hints())
    assert spec.dim == 24
    store = create_store(tmp_path / "s", spec)
    with pytest.raises(SlideError, match=r"dim 16 \(the store: 24\)"):
        import_file(store, FORMATS["trident"], "a", files["a"], Hints())
    with h5py.File(files["b"], "a") as file:
        file["coords"].attrs["patch_size"] = 512
    with pytest.raises(SlideError, match=r"tiling tile_px 512 \(the store: 256\)"):
        import_file(store, FORMATS["trident"], "b", files["b"], Hints())
    assert store.slide_ids() == []


def test_the_folder_that_is_meant_must_be_clear(lay_out: Layout, tmp_path: Path) -> None:
    lay_out("trident", tmp_path / "in", "a")
    (tmp_path / "in" / "features_conch").mkdir()
    with pytest.raises(UsageError, match="features_conch, features_uni_v1"):
        find_files(FORMATS["trident"], tmp_path / "in")
    with pytest.raises(UsageError, match="does not exist"):
        find_files(FORMATS["npy"], tmp_path / "nowhere")
    lay_out("atlaspatch", tmp_path / "atlas", "a")
    with pytest.raises(SlideError, match="features of resnet50, uni_v1"):
        take("atlaspatch", tmp_path / "atlas", tmp_path / "s", Hints())


def test_a_file_that_another_process_writes_meanwhile_is_not_replaced(
    lay_out: Layout, tmp_path: Path
) -> None:
    lay_out("npy", tmp_path / "in", "a")
    store = take("npy", tmp_path / "in", tmp_path / "s", Hints())
    theirs = np.ones((700, 24), np.float32)

    def late(folder: Path, slide: Any) -> list[Any]:
        *rest, last = FORMATS["npy"].parts(folder, slide)

        def write(to: Path) -> None:
            last.write(to)
            np.save(last.path, theirs)

        return [*rest, replace(last, write=write)]

    with pytest.raises(SlideError, match="exists with other content"):
        export_slide(store, replace(FORMATS["npy"], parts=late), "a", tmp_path / "out")
    assert (np.load(tmp_path / "out" / "a.npy") == theirs).all()
    assert len(list((tmp_path / "out").iterdir())) == 2


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from hmil_fast.errors import StoreError
from hmil_fast.io.interchange import FORMATS, export_slide
from hmil_fast.io.store import open_store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = open_store(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
for form in (f for f in FORMATS.values() if f.parts):
    try:
        export_slide(store, form, "a", Path(sys.argv[2]) / form.name, 0.25)
    except StoreError as error:
        print(form.name, "failed at" in error.what)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_no_file_under_its_name(lay_out: Layout, tmp_path: Path) -> None:
    lay_out("trident", tmp_path / "in", "a", rows=5000)
    take("trident", tmp_path / "in", tmp_path / "s")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "s", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{name} True" for name in EXPORTED]
    left = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert left <= {"a.coords.npy", "a.h5"}
    assert {p.parent.name for p in (tmp_path / "out").rglob("a.h5")} <= {"patches"}


@pytest.mark.parametrize("shape", [(1, 20, 8), (20, 1, 8), (20, 8, 1, 1)])
@pytest.mark.parametrize("source", ["trident", "clam", "npy", "pt"])
def test_a_batch_of_one_slide_is_that_slide(
    source: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    features = np.arange(160, dtype=np.float32).reshape(shape)
    coords = np.arange(40).reshape((1, 20, 2) if shape[0] == 1 else (20, 2))
    path = tmp_path / f"s0{FORMATS[source].suffixes[0]}"
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["features"], file["coords"] = features, coords
    else:
        np.save(tmp_path / "s0.coords.npy", coords)
        if source == "npy":
            np.save(path, features)
        else:
            torch.save(torch.from_numpy(features), path)
    store = take(source, path, tmp_path / "s")
    np.testing.assert_array_equal(store.features("s0"), np.arange(160).reshape(20, 8))
    np.testing.assert_array_equal(store.coords("s0"), np.arange(40).reshape(20, 2))


def test_one_tile_and_several_slides_in_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.ones((1, 1, 8)))
    np.save(tmp_path / "two.npy", np.ones((2, 20, 8)))
    assert take("npy", tmp_path / "one.npy", tmp_path / "s").features("one").shape == (1, 8)
    with pytest.raises(SlideError, match=r"shape \(2, 20, 8\), not \(tiles, values\)"):
        take("npy", tmp_path / "two.npy", tmp_path / "s2")


def test_a_folder_of_slide2vec(lay_out: Layout, tmp_path: Path) -> None:
    root = tmp_path / "in"
    lay_out("slide2vec", root, "a")
    lay_out("slide2vec", root, "b", kind="npz")
    lay_out("slide2vec", root, "none", rows=0, kind="alone")
    for folder in ("tile_embeddings", "tiles"):  # a class of annotations
        (root / folder / "tumor").mkdir()
        for path in [*(root / folder).glob("b.*")]:
            path.rename(root / folder / "tumor" / path.name)
    (root / "slide_embeddings").mkdir()
    torch.save(torch.zeros(24), root / "slide_embeddings" / "a.pt")
    store = take("slide2vec", root, tmp_path / "s", Hints())
    assert store.slide_ids() == ["a", "none", "tumor/b"]
    assert store.record("none").num_tiles == 0
    assert store.spec.encoder["name"] == "uni2"
    assert store.spec.tiling == {"imported_from": "slide2vec", "tile_px": 224, "mpp": 0.5}
    for slide_id in ("a", "tumor/b"):
        rng = np.random.default_rng([700, 24, *slide_id[-1].encode()])
        features = rng.standard_normal((700, 24), np.float32).astype(np.float16)
        np.testing.assert_array_equal(store.features(slide_id), features)
        np.testing.assert_array_equal(store.coords(slide_id), rng.integers(0, 200, (700, 2)) * 512)
        attrs = store.record(slide_id).attrs
        assert attrs["level0_size"] == [110_000, 100_000]
        assert (attrs["level"], attrs["read_px"]) == (1, 224)
    # the tensors alone, then with the folder of coordinates named
    (root / "tile_embeddings").rename(tmp_path / "moved")
    bare = take("slide2vec", tmp_path / "moved", tmp_path / "bare", Hints())
    assert bare.record("a").attrs["coords_convention"] is None
    named = take("slide2vec", tmp_path / "moved", tmp_path / "t", Hints(coords=root / "tiles"))
    assert named.record("tumor/b").content_digest == store.record("tumor/b").content_digest
