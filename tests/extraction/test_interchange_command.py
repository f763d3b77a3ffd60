"""`store import` and `store export` as a person runs them."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import h5py
import numpy as np
import pytest

from hmil_fast.cli.main import main
from hmil_fast.io.store import StoreSpec, create_store, open_store

Cli = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Four slides in STAMP's layout: two good ones, a torn one, one of another encoder."""
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name, dim in (("a", 8), ("sub/b", 8), ("c", 8), ("d", 16)):
        with h5py.File(tmp_path / "in" / f"{name}.h5", "w") as file:
            file["feats"] = rng.standard_normal((50, dim)).astype(np.float16)
            file["coords"] = (np.arange(100).reshape(50, 2) * 256).astype(np.float32)
            file.attrs.update({"extractor": "uni", "unit": "um", "tile_size_um": 256.0})
    torn = tmp_path / "in" / "c.h5"
    torn.write_bytes(torn.read_bytes()[:-100])
    (tmp_path / "mpp.csv").write_text("slide_id,mpp\nsub/b,0.5\n")
    return tmp_path


def test_a_broken_file_stops_no_other_and_a_second_run_finds_the_rest_done(
    cli: Cli, cohort: Path
) -> None:
    command = ("store", "import", "--format", "stamp", cohort / "in", cohort / "s")
    resolution = ("--slide-mpp", "0.25", "--manifest", cohort / "mpp.csv")
    done = cli(*command, *resolution)
    assert done.returncode == 1
    assert "2 slides imported (100 tiles), 0 were done before, 2 failed" in done.stdout
    assert "c.h5: is not a sound HDF5 file" in done.stdout
    assert "dim 16 (the store: 8)" in done.stdout
    store = open_store(cohort / "s")
    assert store.slide_ids() == ["a", "sub/b"]
    assert store.coords("a")[1].tolist() == [2048, 3072]
    assert store.coords("sub/b")[1].tolist() == [1024, 1536]
    assert json.loads(cli("store", "info", cohort / "s").stdout)["slide_ids"]["a"]["mpp"] == 0.25
    assert "0 slides imported (0 tiles), 2 were done before" in cli(*command, *resolution).stdout

    changed = cli(*command, "--slide-mpp", "0.5")
    assert "slide 'a' is in the store with other content than" in changed.stdout
    assert f"store drop {cohort / 's'} a" in changed.stdout

    out = cohort / "out"
    exported = cli("store", "export", "--format", "stamp", cohort / "s", out)
    assert (exported.returncode, sorted(p.name for p in out.iterdir())) == (
        0,
        ["a.h5", "sub%2Fb.h5"],
    )
    back = cli("store", "import", "--format", "stamp", out, cohort / "s", *resolution)
    assert (back.returncode, "2 were done before" in back.stdout) == (0, True)


def test_a_folder_of_npy_trains(cli: Cli, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    lines = ["slide_id,label"]
    for i in range(12):
        np.save(tmp_path / "in" / f"s{i}.npy", rng.standard_normal((20, 8)) + i % 3)
        lines.append(f"s{i},{'abc'[i % 3]}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    (tmp_path / "tree.yaml").write_text("x: [a]\ny: [b, c]\n")
    done = cli("store", "import", "--format", "npy", tmp_path / "in", tmp_path / "s")
    assert (
        done.returncode,
        "12 slides, s0 the first: it comes without coordinates" in done.stderr,
    ) == (0, True)
    trained = cli(
        *("train", "--store", tmp_path / "s", "--labels", tmp_path / "labels.csv"),
        *("--tree", tmp_path / "tree.yaml", "--out", tmp_path / "run"),
        *("--model", "mean", "--folds", 2, "--epochs", 1, "--device", "cpu"),
    )
    assert trained.returncode == 0, trained.stderr


@pytest.mark.usefixtures("own_signals")
def test_export_says_what_it_leaves_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiling = {"mpp": 0.5, "tile_px": 256}
    more = {"coarser": [2.0], "views": {"count": 3}}
    for name, about in (("one", {}), ("several", more)):
        store = create_store(tmp_path / name, StoreSpec(4, "float16", {}, tiling | about))
        counts = [2, 1][: len(store.spec.scales)]
        rows = sum(counts)
        with store.writer("s", 2, {}, [(count, {}) for count in counts[1:]]) as writer:
            for scale, count in enumerate(counts):
                for view in range(1 + store.spec.views):
                    writer.append(np.zeros((count, 4), np.float16), scale, view)
            parent = np.zeros(2, np.int32) if about else None
            writer.commit(np.zeros((rows, 2), np.int32), np.zeros(rows, np.uint8), None, parent)

    def export(name: str, *args: str) -> str:
        out = str(tmp_path / f"out of {name}{args}")
        assert main(["store", "export", "--format", "npy", str(tmp_path / name), out, *args]) == 0
        return capsys.readouterr().out

    assert "scale" not in export("one")
    said = export("several")
    assert "the scale at 0.5 µm per px was exported, --mpp takes another; the 3 augm" in said
    assert "the scale at 2 µm per px was exported" in export("several", "--mpp", "2")


def test_wrong_usage(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    nothing = cli("store", "import", "--format", "npy", tmp_path / "in", tmp_path / "s")
    assert (nothing.returncode, "no .npy file in" in nothing.stderr) == (2, True)
    (tmp_path / "in" / "a.npy").write_bytes(b"")
    broken = cli("store", "import", "--format", "npy", tmp_path / "in", tmp_path / "s")
    assert (broken.returncode, "is not a sound .npy file" in broken.stderr) == (2, True)
    (tmp_path / "mpp.csv").write_text("slide_id,mpp\na,-1\n")
    bad = ("--manifest", tmp_path / "mpp.csv")
    wrong = cli("store", "import", "--format", "npy", tmp_path / "in", tmp_path / "s", *bad)
    assert (wrong.returncode, "line 2: mpp is '-1'" in wrong.stderr) == (2, True)
    assert not (tmp_path / "s").exists()
    missing = cli("store", "export", "--format", "npy", tmp_path / "s", tmp_path / "out")
    assert (missing.returncode, "no feature store at" in missing.stderr) == (2, True)
