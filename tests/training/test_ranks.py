"""Two processes of torchrun, by gloo, against one process with the same batches."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hmil_fast.training.run_folder import open_run, read_predictions

# the same batches in any number of processes; a dropped unit depends on the process
CHANGES = {
    "folds": 2, "epochs": 4, "batch_bags": 13, "dropout": 0.0, "feature_dropout": 0.0,
    "precision": "fp32",
}  # fmt: skip
SETTINGS = ("baseline=none", *(f"{name}={value}" for name, value in CHANGES.items()))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture
def torchrun(tmp_path: Path, environment: dict[str, str]) -> Callable[..., Any]:
    def popen(*arguments: Any) -> subprocess.Popen[str]:
        command = [*TORCHRUN, "--max-restarts", "0", "-m", "hmil_fast.cli", *map(str, arguments)]
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return popen


def curve(run: Path) -> dict[tuple[int, int], dict[str, float]]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    names = ("val_loss", "val_auc", "val_balanced_accuracy")
    return {
        (r["fold"], r["epoch"]): {**r["terms"], **{name: r[name] for name in names}}
        for r in records
        if r["event"] == "epoch"
    }


def test_two_processes_train_as_one_does(
    cohort: Any,
    train_small: Callable[..., Any],
    torchrun: Callable[..., Any],
    settings: tuple[str, ...],
    tmp_path: Path,
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    process = torchrun("train", *cohort.arguments, *settings, *SETTINGS, "--out", two)
    train_small(one, **CHANGES)
    printed, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert printed.count("leaf balanced accuracy") == 1  # the first process alone speaks
    sizes = [len(fold.train) % CHANGES["batch_bags"] for fold in open_run(one).folds]
    assert 1 in sizes  # one process had no bag in the last step

    ours, theirs = curve(two), curve(one)
    assert ours.keys() == theirs.keys() == {(f, e) for f in range(2) for e in range(4)}
    for key, terms in theirs.items():
        assert ours[key].keys() == terms.keys()
        for name, value in terms.items():
            assert ours[key][name] == pytest.approx(value, rel=2e-4, abs=1e-5), (key, name)
    tree = open_run(one).tree
    found = read_predictions(two / "predictions.csv", tree)
    wanted = read_predictions(one / "predictions.csv", tree)
    assert [p.slide_id for p in found] == [p.slide_id for p in wanted]
    for p, q in zip(found, wanted, strict=True):
        for a, b in zip(p.probabilities, q.probabilities, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)
    logged = [json.loads(line) for line in (two / "log.jsonl").read_text().splitlines()]
    assert [r["processes"] for r in logged if r["event"] == "fold"] == [2, 2]
    assert len(logged) == 10  # none twice
    assert not list(two.rglob("*.partial"))
