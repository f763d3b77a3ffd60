"""Predictions as files, with and without the opinion of the coarse heads."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from hmil_fast.config import PRESETS, load_config, loss_settings
from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import all_levels, decide
from hmil_fast.runs.archive import set_aside
from hmil_fast.runs.checkpoint import load_module
from hmil_fast.runs.lock import own_log
from hmil_fast.runs.predictions import (
    Prediction,
    read_predictions,
    stack_heads,
    write_predictions,
)
from hmil_fast.runs.run import create_run, open_run

TREE = LabelTree.from_nested({"n": None, "t": {"b": None, "m": ["low", "high"]}})


def predictions(heads: bool) -> list[Prediction]:
    rng = np.random.default_rng(0)

    def levels() -> tuple[np.ndarray, ...]:
        return tuple(level[0] for level in all_levels(TREE, rng.dirichlet(np.ones(4))[None]))

    return [
        Prediction(f"s{i}", f"p{i}", 0, TREE.leaves[i], 7, levels(), levels()[:2] if heads else ())
        for i in range(4)
    ]


@pytest.mark.parametrize("heads", [True, False])
def test_predictions_and_heads_come_back_as_written(tmp_path: Path, heads: bool) -> None:
    path = tmp_path / "predictions.csv"
    wanted = predictions(heads)
    write_predictions(path, TREE, wanted, heads=heads)
    for found, want in zip(read_predictions(path, TREE), wanted, strict=True):
        assert found.slide_id == want.slide_id
        assert len(found.heads) == (2 if heads else 0)
        for a, b in zip(
            (*found.probabilities, *found.heads), (*want.probabilities, *want.heads), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-8)
    with path.open(newline="") as file:
        row = next(csv.DictReader(file))
    assert ("h1_m" in row) is heads
    assert float(row["p1_m"]) == pytest.approx(wanted[0].probabilities[1][2])
    if heads:
        assert float(row["h1_m"]) == pytest.approx(wanted[0].heads[1][2])
        stacked = stack_heads(wanted)
        assert [level.shape for level in stacked] == [(4, 2), (4, 3)]
        np.testing.assert_array_equal(stacked[1][1], wanted[1].heads[1])
    for name, level in (("prediction", 2), ("prediction_1", 1), ("prediction_0", 0)):
        answer = decide(TREE, wanted[0].probabilities[-1][None]).nodes[level, 0]
        assert row[name] == TREE.names[level][answer]
    assert "p0_n" not in row  # a chain of only children is one node


@pytest.mark.parametrize("part", [".", "baseline"])
def test_a_run_that_is_trained_is_not_set_aside(tmp_path: Path, part: str) -> None:
    run = tmp_path / "run"
    (run / "baseline").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 1\n")
    with own_log(run / part / "log.jsonl"), pytest.raises(UsageError, match="another process"):
        set_aside(run)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    moved = set_aside(run)
    assert moved is not None
    assert (moved / "config.yaml").read_text() == "seed: 1\n"
    assert not run.exists()


def test_a_run_keeps_to_what_its_preset_meant(
    run: Any, cohort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_run(run.path)
    meant, fingerprint = loss_settings(before.config), before.config.fingerprint()
    assert before.sums
    other = replace(PRESETS["best"], coarse="head", readout="paper", lr=1.0)
    monkeypatch.setitem(PRESETS, "best", other)
    again = open_run(run.path)
    assert loss_settings(again.config) == meant
    assert again.config.fingerprint() == fingerprint
    assert again.sums
    # one that asks for the preset as it is now asks for another run
    asked = load_config(run.path / "config.yaml")
    assert loss_settings(asked).coarse == "head"
    with pytest.raises(UsageError, match="coarse is 'head', was 'sum'"):
        create_run(run.path, asked, again.tree, (again.folds, again.slides), cohort.store)


def test_weights_of_another_version_are_not_to_be_deleted() -> None:
    with pytest.raises(UsageError) as refused:
        load_module(nn.Linear(2, 3), nn.Linear(2, 4).state_dict())
    assert "version" in refused.value.fix
    assert "delete" not in refused.value.fix
