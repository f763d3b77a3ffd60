"""Training through the command line: what a run leaves behind, and that it learns."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import safe_open

from hmil_fast.bags.splits import read_splits
from hmil_fast.cli.main import main
from hmil_fast.runs.predictions import read_predictions
from hmil_fast.runs.run import open_run


def test_a_run_holds_all_that_is_promised(run: Any) -> None:
    assert run.printed.returncode == 0, run.printed.stderr
    for folder in (run.path, run.path / "baseline"):
        names = {p.name for p in folder.iterdir()}
        wanted = {"config.yaml", "tree.json", "splits.json", "run.json", "log.jsonl"}
        wanted |= {"tensorboard", "predictions.csv", "conformal.csv", "fold-0", "fold-1", "fold-2"}
        assert names == wanted | ({"metrics.json", "baseline"} if folder == run.path else set())
        for fold in range(3):
            inside = {p.name for p in (folder / f"fold-{fold}").iterdir()}
            assert inside >= {"best.safetensors", "predictions.csv", "val_predictions.csv"}
    assert yaml.safe_load((run.path / "config.yaml").read_text())["dropout"] == 0.25
    assert read_splits(run.path / "splits.json") == read_splits(
        run.path / "baseline" / "splits.json"
    )


def test_every_slide_is_tested_once_the_empty_one_too(run: Any, cohort: Any) -> None:
    for folder in (run.path, run.path / "baseline"):
        with (folder / "predictions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert Counter(row["slide_id"] for row in rows) == Counter(list(cohort.slides))
        folds, _ = read_splits(run.path / "splits.json")
        for row in rows:
            assert row["slide_id"] in folds[int(row["fold"])].test
            level0 = np.array([float(row[f"p0_{n}"]) for n in ("benign", "malignant")])
            level1 = np.array([float(row[f"p1_{n}"]) for n in ("N", "PB", "DCIS", "IC")])
            np.testing.assert_allclose([level0.sum(), level1.sum()], 1, atol=1e-6)
            np.testing.assert_allclose(level0, [level1[:2].sum(), level1[2:].sum()], atol=1e-6)
        tiles = {row["slide_id"]: int(row["num_tiles"]) for row in rows}
        assert tiles["s05"] == 0
        n = cohort.slides["s06"][1]
        assert tiles["s06"] == n - len(range(0, n, 3))  # tiles that could not be decoded
    assert "1 slides have no tissue tiles, their bags are empty: s05" in run.printed.stderr


def test_what_labels_and_store_do_not_share_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "npy").mkdir()
    rng = np.random.default_rng(0)
    for i in range(14):
        x = rng.normal(size=(9, 4)).astype(np.float32)
        np.save(tmp_path / "npy" / f"s{i}.npy", np.full_like(x, np.nan) if i == 3 else x)
    store = str(tmp_path / "store")
    assert main(["store", "import", "--format", "npy", str(tmp_path / "npy"), store]) == 0
    labels, tree = tmp_path / "labels.csv", tmp_path / "tree.yaml"
    rows = "".join(f"s{i}.SVS;{'am'[i % 2]};c{i // 2 % 6}\n" for i in range(1, 13))
    labels.write_text(f"slide_id;label;case_id\n{rows}lost;a;c9\nx;all;c9\n")
    tree.write_text("all: [a, b]\nm:\n")
    command = ["train", "--store", store, "--labels", str(labels), "--tree", str(tree)]
    command += ["--out", str(tmp_path / "run"), "--folds", "2", "--epochs", "1", "--model", "mean"]
    capsys.readouterr()
    assert main([*command, "baseline=none"]) == 2
    said = capsys.readouterr().err
    assert "1 of 14 slides have a label that is an inner node of the tree" in said
    tree.write_text("a:\nm:\n")
    labels.write_text(labels.read_text().replace("x;all;c9\n", ""))
    assert main([*command, "baseline=none"]) == 0
    said = capsys.readouterr().err
    for note in (
        f"{labels}: column 'case_id' is read as patient_id",
        "12 slides have another name in the store: 's1.SVS' is 's1', 's2.SVS' is 's2'",
        "1 labelled slides are not in the store: lost",
        "2 slides of the store have no label here: s0, s13",
        "1 slides have only tiles that could not be decoded, or rows that are not finite",
    ):
        assert said.count(note) == 1, note
    assert {p.patient_id for p in open_run(tmp_path / "run").slides} == {f"c{i}" for i in range(6)}


def test_the_planted_signal_is_learnt_and_printed(run: Any) -> None:
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert (metrics["model"], metrics["baseline"]["model"]) == ("hmil", "mean")
    assert (metrics["pooled"]["slides"], metrics["pooled"]["patients"]) == (36, 30)
    assert len(metrics["folds"]) == 3
    for metrics_of in (metrics, metrics["baseline"]):
        assert min(metrics_of["calibration"]["slides"]) > 0
        assert len(metrics_of["calibration"]["temperature"]) == 3
        assert metrics_of["conformal"]["node"]["coverage"]["value"] > 0.8
    for level in ("0", "1"):
        cell = metrics["pooled"]["levels"][level]["balanced_accuracy"]
        assert cell["value"] > 0.85
        assert cell["low"] <= cell["value"] <= cell["high"]
    assert 0 <= metrics["baseline"]["pooled"]["levels"]["1"]["auc"]["low"] <= 1
    out = run.printed.stdout
    accuracy = metrics["pooled"]["levels"]["1"]["balanced_accuracy"]
    printed = f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
    line = next(line for line in out.splitlines() if "leaf balanced accuracy" in line)
    assert printed in line
    assert "36 slides of 30 patients" in out
    assert "mean (baseline)" in out
    assert re.search(r"best epoch .* bags/s, waited for data [0-9.]+% of", run.printed.stderr)
    assert "best epoch" not in out


def test_the_log_says_which_epoch_was_best(run: Any) -> None:
    records = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    starts = [r for r in records if r["event"] == "fold"]
    assert [(r["fold"], r["epoch"], r["step"]) for r in starts] == [(f, 0, 0) for f in range(3)]
    assert starts[0]["cache"]["tier"] == "host"
    assert "features: " in run.printed.stderr
    assert "in main memory (" in run.printed.stderr
    for fold in range(3):
        mine = [r for r in records if r["event"] == "epoch" and r["fold"] == fold]
        assert [r["epoch"] for r in mine] == list(range(len(mine)))
        scores = [(r["val_balanced_accuracy"], -r["val_loss"]) for r in mine]
        best = scores.index(max(scores))
        assert len(mine) == min(40, best + 1 + 15)  # patience
        with safe_open(run.path / f"fold-{fold}" / "best.safetensors", "pt") as file:
            assert json.loads(file.metadata()["state"])["best"]["epoch"] == best


@pytest.mark.slow
def test_a_finished_run_is_only_printed(
    run: Any, cohort: Any, hmil: Callable[..., Any], settings: tuple[str, ...]
) -> None:
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    times = {p: p.stat().st_mtime_ns for p in before if p.suffix == ".safetensors"}
    again = hmil("train", *cohort.arguments, "--out", run.path, *settings)
    assert again.returncode == 0
    assert again.stdout == run.printed.stdout
    assert "hmil: all 3 folds are trained already" in again.stderr
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_predictions_come_back_as_written(run: Any) -> None:
    opened = open_run(run.path)
    found = read_predictions(run.path / "predictions.csv", opened.tree)
    assert {p.fold for p in found} == {0, 1, 2}
    assert {len(level) for p in found for level in p.probabilities} == {2, 4}
    assert b"\r" not in (run.path / "predictions.csv").read_bytes()


@pytest.mark.parametrize("model", ["hmil", "mean"])
def test_slides_without_tiles_alone_in_a_batch_give_finite_steps(
    tmp_path: Path, cohort: Any, model: str, train_small: Callable[..., Any]
) -> None:
    run = train_small(tmp_path / "run", model=model, batch_bags=1, epochs=2)
    predictions = read_predictions(run.path / "predictions.csv", run.tree)
    empty = next(p for p in predictions if p.slide_id == "s05")
    assert empty.num_tiles == 0
    assert all(np.isfinite(level).all() for level in empty.probabilities)
