"""A run repeats and predicts with another device, cache, precision and number of threads."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hmil_fast.config import PRESETS, Runtime, load_config
from hmil_fast.labels import LabelTree
from hmil_fast.runs.predictions import read_predictions
from hmil_fast.runs.run import open_run

OLD = Path(__file__).resolve().parent.parent / "data" / "run-before-settings"
OLD_SETTINGS = ("folds=2", "epochs=2", "hidden=8", "lr=3e-3", "batch_bags=8", "preset=paper")


def leaves_of(path: Path, tree: LabelTree) -> dict[str, np.ndarray]:
    """Leaf probabilities by slide id."""
    return {p.slide_id: p.probabilities[-1] for p in read_predictions(path, tree)}


def assert_close(a: dict[str, np.ndarray], b: dict[str, np.ndarray], atol: float) -> None:
    assert a.keys() == b.keys()
    assert len(a) >= 16
    for slide_id, p in a.items():
        np.testing.assert_allclose(p, b[slide_id], atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize(
    "runtime",
    [("--device", "cpu"), ("cache=stream",), ("precision=bf16", "threads=1"), ("cache=map",)],
)
def test_a_finished_run_repeats_with_another_runtime(
    run: Any, cohort: Any, settings: Sequence[str], hmil: Callable[..., Any], runtime: Sequence[str]
) -> None:
    names = {word.partition("=")[0] for word in runtime} | {"device", "precision"}
    words = [word for word in settings if word.partition("=")[0] not in names]
    done = hmil("train", *cohort.arguments, "--out", run.path, *words, *runtime)
    assert done.returncode == 0, done.stderr
    assert "all 3 folds are trained already" in done.stderr


def test_the_settings_of_the_runtime_are_not_written(run: Any) -> None:
    text = (run.path / "config.yaml").read_text()
    assert "lr: 0.003\n" in text
    assert not any(f"{name}:" in text for name in ("device", "cache", "precision", "threads"))


def test_a_run_predicts_in_the_precision_that_it_was_told_to_train_in(run: Any) -> None:
    opened = open_run(run.path)
    assert opened.precision_for(Runtime()) == "fp32"
    assert opened.precision_for(Runtime(precision="bf16")) == "bf16"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "heatmap", "evaluate", "report"])
def test_commands_take_a_device_and_name_one_that_is_not_there(
    run: Any, cohort: Any, hmil: Callable[..., Any], command: str, tmp_path: Path
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    for fold in range(3):
        (tmp_path / "run" / f"fold-{fold}" / "val_predictions.csv").unlink()
    store = ("--store", cohort.path / "store")
    more = {"heatmap": ("s00", "--out", tmp_path / "s00.png")}.get(command, ())
    bad = hmil(command, tmp_path / "run", *more, *store, "--device", "cuda:7")
    assert bad.returncode == 2
    assert "device 'cuda:7' cannot be used" in bad.stderr
    good = hmil(command, tmp_path / "run", *more, *store, "--device", "cpu")
    assert good.returncode == 0, good.stderr


@pytest.mark.slow
def test_a_run_of_the_layout_before_is_read(tmp_path: Path, cohort: Any, hmil: Any) -> None:
    shutil.copytree(OLD, tmp_path / "run")
    opened = open_run(tmp_path / "run")
    assert opened.config == load_config(None, OLD_SETTINGS)
    assert (opened.config.recipe.preset, opened.precision) == ("paper", "fp32")
    assert opened.config.recipe.ham == PRESETS["paper"].ham
    out = ("--out", tmp_path / "p.csv")
    done = hmil("predict", tmp_path / "run", "--store", cohort.path / "store", *out)
    assert done.returncode == 0, done.stderr
    evaluated = hmil("evaluate", tmp_path / "run")
    assert evaluated.returncode == 0, evaluated.stderr
    old = leaves_of(OLD / "predictions.csv", opened.tree)
    assert_close(leaves_of(tmp_path / "p.csv", opened.tree), old, 1e-5)


@pytest.mark.slow
def test_a_run_of_the_layout_before_resumes(tmp_path: Path, cohort: Any, hmil: Any) -> None:
    shutil.copytree(OLD, tmp_path / "run")
    last = tmp_path / "run" / "fold-1" / "predictions.csv"
    last.unlink()
    done = hmil(
        "train", *cohort.arguments, "--out", tmp_path / "run", *OLD_SETTINGS, "cache=stream"
    )
    assert done.returncode == 0, done.stderr
    assert "mean: all 2 folds are trained already" in done.stderr
    tree = open_run(OLD).tree
    old = leaves_of(OLD / "fold-1" / "predictions.csv", tree)
    assert_close(leaves_of(last, tree), old, 5e-3)


@pytest.mark.slow
def test_train_keeps_the_evaluation_that_was_asked_for(
    run: Any, cohort: Any, settings: Sequence[str], hmil: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    assert hmil("evaluate", tmp_path / "run", "--alpha", "0.3").returncode == 0
    asked = (tmp_path / "run" / "metrics.json").read_text()
    assert '"risk": 0.3' in asked
    done = hmil("train", *cohort.arguments, "--out", tmp_path / "run", *settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.json").read_text() == asked
