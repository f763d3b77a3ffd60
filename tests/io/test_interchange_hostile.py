"""Feature files that are damaged, half written, or made to do harm: one error, no allocation."""

import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hmil_fast.api.interchange import import_features
from hmil_fast.errors import SlideError, StoreError
from hmil_fast.io.interchange import (
    FORMATS,
    Hints,
    export_slide,
    find_files,
    h5_process,
    import_file,
    likely_spec,
)
from hmil_fast.io.store import FeatureStore, StoreSpec, create_store

Layout = Callable[..., Path]


def read(source: str, path: Path, hints: Hints | None = None) -> None:
    with FORMATS[source].read(path, "a", hints or Hints(mpp={"": 0.25})) as bag:
        for _ in bag.blocks():
            pass


@pytest.mark.parametrize("source", ["trident", "clam", "stamp"])
def test_unequal_rows(source: str, lay_out: Layout, tmp_path: Path) -> None:
    path = lay_out(source, tmp_path, "a")
    with h5py.File(path, "a") as file:
        coords = file["coords"][:-1]
        del file["coords"]
        file["coords"] = coords
    with pytest.raises(SlideError, match=r"700 rows of features but .*\(699, 2\)"):
        read(source, path)


def test_tiles_of_another_run(lay_out: Layout, tmp_path: Path) -> None:
    path = lay_out("clam", tmp_path, "a")
    with h5py.File(tmp_path / "patches" / "a.h5", "a") as file:
        file["coords"][5, 0] += 1
    with pytest.raises(SlideError, match="its coordinates are not those of"):
        read("clam", path)


@pytest.mark.parametrize(
    ("corner", "problem"),
    [(2**31, "not finite level-0 pixels"), (np.nan, "not finite"), (0.5, "not whole level-0")],
)
def test_coordinates_that_are_none(corner: float, problem: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 8)))
    np.save(tmp_path / "a.coords.npy", np.array([[0, 0], [corner, 1]]))
    with pytest.raises(SlideError, match=problem):
        read("npy", tmp_path / "a.npy")


def test_micrometres_need_the_slides_resolution(lay_out: Layout, tmp_path: Path) -> None:
    path = lay_out("stamp", tmp_path, "a")
    with pytest.raises(SlideError, match="does not state the slide's µm/px"):
        read("stamp", path, Hints())
    with h5py.File(path, "a") as file:
        file.attrs["unit"] = "px"
    with pytest.raises(SlideError, match="unit is 'px'"):
        read("stamp", path)


def test_a_slide_embedding_is_no_bag(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["coords"] = np.ones(768, "f4"), np.zeros((768, 2), int)
    with pytest.raises(SlideError, match=r"shape \(768,\).*"):
        read("trident", tmp_path / "a.h5")


@pytest.mark.parametrize("source", ["trident", "clam", "stamp", "atlaspatch"])
@pytest.mark.parametrize("cut", [0, 100, 0.5, 0.99])
def test_a_truncated_h5(source: str, cut: float, lay_out: Layout, tmp_path: Path) -> None:
    path = lay_out(source, tmp_path, "a")
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
    with pytest.raises(SlideError, match="not a sound HDF5 file"):
        read(source, path, Hints(encoder="uni_v1", mpp={"": 0.25}))


def test_an_h5_that_was_half_written(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        features = file.create_dataset("features", (1000, 8), "f4", chunks=(100, 8))
        features[:500] = 1
        file["coords"] = np.zeros((1000, 2), int)
    with pytest.raises(SlideError, match="half written"):
        read("trident", tmp_path / "a.h5")


def test_an_h5_that_claims_terabytes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", (2**30, 4096), "f4", chunks=(1, 4096))
        packed = file.create_dataset("b", (2**24, 64), "f4", chunks=(2**16, 64), compression=9)
        packed[: 2**16] = 0
        file["coords"] = np.zeros((2, 2), int)
    with pytest.raises(SlideError, match="claims 17,592,186,044,416 bytes"):
        read("trident", tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["features"]
        file.move("b", "features")
    with pytest.raises(SlideError, match="claims 4,294,967,296 bytes"):
        read("trident", tmp_path / "a.h5")


@pytest.mark.parametrize("kind", ["soft", "external", "raw", "virtual", "text", "reference"])
def test_an_h5_that_points_elsewhere(kind: str, lay_out: Layout, tmp_path: Path) -> None:
    path, other = lay_out("trident", tmp_path, "a", rows=10), tmp_path / "b.h5"
    (tmp_path / "secret").write_bytes(b"x" * 8000)
    with h5py.File(path, "a") as file, h5py.File(other, "w") as there:
        there["features"] = file["features"][:]
        del file["features"]
        if kind == "soft":
            file["features"] = h5py.SoftLink("/coords")
        elif kind == "external":
            file["features"] = h5py.ExternalLink(other.name, "features")
        elif kind == "raw":
            where = [(str(tmp_path / "secret"), 0, 960)]
            file.create_dataset("features", (10, 24), "f4", external=where)
        elif kind == "virtual":
            layout = h5py.VirtualLayout((10, 24), "f4")
            layout[:] = h5py.VirtualSource(str(other), "features", (10, 24))
            file.create_virtual_dataset("features", layout)
        elif kind == "text":
            file["features"] = ["a"] * 10
        else:
            file["features"] = np.array([file["coords"].ref] * 10, h5py.ref_dtype)
    with pytest.raises(SlideError, match=r"link to somewhere else|in other files|not numbers"):
        read("trident", path)


def test_attributes_without_end(lay_out: Layout, tmp_path: Path) -> None:
    path = lay_out("stamp", tmp_path, "a")
    with h5py.File(path, "w", libver="latest") as file:
        file["feats"], file["coords"] = np.ones((2, 8), "f2"), np.zeros((2, 2), "f4")
        file.attrs["unit"] = "um"
        file.attrs["long"] = np.zeros(2**18)
    with pytest.raises(SlideError, match="attribute 'long' is over"):
        read("stamp", path)


def test_arrays_of_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[{}]], object), allow_pickle=True)
    with pytest.raises(SlideError, match=r"is not a sound .npy file"):
        read("npy", tmp_path / "a.npy")
    with (tmp_path / "b.npy").open("wb") as file:
        np.savez(file, np.ones((3, 4)))
    with pytest.raises(SlideError, match="an archive"):
        read("npy", tmp_path / "b.npy")


def test_an_npy_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    for number, shape in enumerate([(2**31 - 1, 4096), (10, 8), (2**62, 2**62), (2**32, 2**32)]):
        path = tmp_path / f"{number}.npy"
        with path.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(300))
        with pytest.raises(SlideError, match=r"is not a sound .npy file"):
            read("npy", path)


def test_an_npy_with_a_torn_header(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.ones((4, 4)))
    data = path.read_bytes()
    for torn in (data[:60], data.replace(b"}", b"("), data.replace(b"'shape'", b"'ahape'"), b""):
        path.write_bytes(torn)
        with pytest.raises(SlideError, match="not a sound"):
            read("npy", path)


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("raise SystemExit('ran')",))


def test_pt_files_that_do_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"features": Bomb()}, path)
    with pytest.raises(SlideError, match="torch refuses it"):
        read("pt", path)
    torch.save(torch.zeros(1).expand(2**31 - 1, 1024), path)
    with pytest.raises(SlideError, match=r"claims \(2147483647, 1024\)"):
        read("pt", path)
    torch.save(torch.zeros(1000, 8), path, _use_new_zipfile_serialization=False)
    with pytest.raises(SlideError, match=r"not a file of torch.save since"):
        read("pt", path)
    torch.save(torch.zeros(100_000, 8), path)
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as packed:
        for info in plain.infolist():
            packed.writestr(info.filename, plain.read(info))
    with pytest.raises(SlideError, match="is packed"):
        read("pt", tmp_path / "b.pt")
    for value in ({"a": torch.zeros(2, 2)}, torch.zeros(2, 2).to_sparse(), np.zeros((2, 2))):
        torch.save(value, path)
        with pytest.raises(SlideError, match=r"not a tensor|torch refuses it"):
            read("pt", path)
    torch.save(torch.zeros(2, 2, dtype=torch.int8), path)
    with pytest.raises(SlideError, match="features are int8"):
        read("pt", path)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return create_store(tmp_path / "s", StoreSpec(8, "float32", {"name": "x"}, {}))


@pytest.mark.parametrize("source", sorted(f.name for f in FORMATS.values() if f.parts))
def test_slide_ids_stay_below_the_folder(source: str, store: FeatureStore, tmp_path: Path) -> None:
    attrs = {"tile_px_level0": 256, "mpp": {"level0": 0.25}}
    for slide_id in ("../../up", "/etc/x", "a/b", "."):
        with store.writer(slide_id, 3, attrs) as writer:
            writer.append(np.ones((3, 8), np.float32))
            writer.commit(np.zeros((3, 2), int), np.zeros(3, int))
    out = tmp_path / "deep" / "out"
    for slide_id in store.slide_ids():
        export_slide(store, FORMATS[source], slide_id, out)
    made = [p for p in tmp_path.rglob("*") if p.is_file() and store.path not in p.parents]
    assert len(made) >= 4
    assert all(p.relative_to(out) for p in made)
    back = [slide_id for slide_id, _ in find_files(FORMATS[source], out)]
    assert sorted(back) == store.slide_ids()


def test_an_escaped_name_cannot_make_another_folders_coordinates_be_read(
    lay_out: Layout, tmp_path: Path
) -> None:
    lay_out("clam", tmp_path / "clam", "a")
    (tmp_path / "clam" / "secret.h5").write_bytes(b"")
    np.save(tmp_path / "..%2Fsecret.npy", np.ones((700, 8)))
    with pytest.raises(SlideError, match=r"patches/..%2Fsecret.h5: there is no such file"):
        read("npy", tmp_path / "..%2Fsecret.npy", Hints(coords=tmp_path / "clam" / "patches"))


KILLED = """
import os, signal, sys
from hmil_fast.io.interchange import FORMATS, Hints, find_files, import_file
from hmil_fast.io.store import SlideWriter, open_store
from pathlib import Path
store, form = open_store(sys.argv[1]), FORMATS["npy"]
append, seen = SlideWriter.append, []
def die(self, rows, *more, **about):
    append(self, rows, *more, **about)
    seen.append(len(rows))
    if sum(seen) > 4096:
        os.kill(os.getpid(), signal.SIGKILL)
SlideWriter.append = die
for slide_id, path in find_files(form, Path(sys.argv[2])):
    import_file(store, form, slide_id, path, Hints())
"""


def test_a_killed_import_leaves_no_half_slide_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", np.ones((100, 8), np.float32))
    np.save(tmp_path / "in" / "b.npy", np.ones((9000, 8), np.float32))
    encoder = {"name": "unknown", "dim": 8, "imported_from": "npy"}
    store = create_store(tmp_path / "s", StoreSpec(8, "float32", encoder, {"imported_from": "npy"}))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "s", tmp_path / "in"], check=False, timeout=600
    )
    assert killed.returncode == -9
    assert store.slide_ids() == ["a"]
    taken = [
        import_file(store, FORMATS["npy"], slide_id, path, Hints())
        for slide_id, path in find_files(FORMATS["npy"], tmp_path / "in")
    ]
    assert [(one.tiles, one.before) for one in taken] == [(100, True), (9000, False)]
    assert all(finding.ok for finding in store.verify())


def damaged_files(whole: bytes) -> Iterator[bytes]:
    """Of a file as h5py writes it, those with one bit flipped where such flips hang HDF5."""
    for byte in (4144, 4097, 4120, 4169, 4145, 4121):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[byte] ^= 1 << bit
            yield bytes(damaged)


@pytest.mark.slow
def test_a_file_that_hangs_hdf5_stops_no_other(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lay_out: Layout,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(h5_process, "PATIENCE_SECONDS", 1.0)
    good = lay_out("trident", tmp_path, "good", rows=40, dim=8)
    path = good.with_name("a.h5")
    for damaged in damaged_files(good.read_bytes()):
        path.write_bytes(damaged)
        said = ""
        try:
            read("trident", path)
        except SlideError as error:
            said = error.what
        if f"{path}: was not read within" in said:
            break
    else:
        pytest.skip("this HDF5 reads every one of these files")
    done = import_features(good.parent, tmp_path / "s", "trident")
    assert (done.slides, done.tiles, done.before) == (2, 40, 0)
    ((slide_id, error),) = done.failed
    assert slide_id == "a"
    assert error.what.startswith(f"{path}: was not read within")
    before = h5_process.h5_process()
    for _ in range(3):
        read("trident", good)
    assert h5_process.h5_process() is before
    assert before.alive()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_reader_that_hangs_or_dies_is_replaced(
    number: signal.Signals, lay_out: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(h5_process, "PATIENCE_SECONDS", 1.0)
    path = lay_out("clam", tmp_path, "a", rows=9000)
    process = h5_process.h5_process()
    with FORMATS["clam"].read(path, "a", Hints()) as bag:
        bag.read(0, 4096)
        os.kill(process.pid, number)
        with pytest.raises(SlideError, match=r"was not read within 1 s|ended the process"):
            bag.read(4096, 8192)
    assert not process.alive()
    read("clam", path)
    assert h5_process.h5_process().pid != process.pid


ORPHAN = """
import os, signal, sys
from pathlib import Path
from hmil_fast.io.interchange.h5_process import h5_process
print(h5_process().pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_reader_ends_with_its_parent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN], capture_output=True, timeout=600, check=False
    )
    until = time.monotonic() + 600
    while Path(f"/proc/{int(done.stdout)}").exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_writer_that_dies_leaves_no_file_under_its_name(
    lay_out: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out("trident", tmp_path / "in", "a", rows=9000)
    form, made = FORMATS["trident"], tmp_path / "out" / "a.h5"
    files = find_files(form, tmp_path / "in")
    store = create_store(tmp_path / "s", likely_spec(files, form, Hints()))
    import_file(store, form, *files[0], Hints())
    rows = FeatureStore.read_rows

    def late(self: FeatureStore, slide_id: str, start: int, stop: int) -> object:
        if start:  # the first block is in the file
            os.kill(h5_process.h5_process().pid, signal.SIGKILL)
        return rows(self, slide_id, start, stop)

    with monkeypatch.context() as patched:
        patched.setattr(FeatureStore, "read_rows", late)
        with pytest.raises(StoreError, match="ended the process"):
            export_slide(store, form, "a", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    export_slide(store, form, "a", tmp_path / "out")
    assert made.exists()
