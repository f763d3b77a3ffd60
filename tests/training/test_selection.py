"""Which epoch is kept is decided by the validation slides alone."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hmil_fast.errors import UsageError
from hmil_fast.runs.predictions import read_predictions
from hmil_fast.runs.run import open_run


def official(cohort: Any, path: Path, change: str = "", shift: int = 1) -> Path:
    """Labels with an official split; the leaves of one part are shifted."""
    leaves = ("N", "PB", "DCIS", "IC")
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["slide_id", "label", "split"])
        for i, (slide_id, (leaf, _)) in enumerate(cohort.slides.items()):
            part = ("train", "train", "val", "test")[i // 4 % 4]
            out.writerow([slide_id, leaves[(leaf + shift * (part == change)) % 4], part])
    return path


@pytest.mark.slow
def test_the_test_slides_labels_change_nothing_but_the_metrics(
    tmp_path: Path, cohort: Any, train_small: Callable[..., Any]
) -> None:
    runs = {
        change: train_small(
            tmp_path / f"run-{change}", official(cohort, tmp_path / f"{change}.csv", change)
        )
        for change in ("", "test", "val")
    }

    def kept(run: Any) -> dict[str, bytes]:
        tensors = load_file(run.path / "fold-0" / "best.safetensors")
        return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}

    def log(run: Any) -> list[Any]:
        lines = (run.path / "log.jsonl").read_text().splitlines()
        timing = ("seconds", "instances_per_s", "bags_per_s", "data_share", "cache")
        return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]

    assert kept(runs["test"]) == kept(runs[""])
    assert log(runs["test"]) == log(runs[""])
    assert kept(runs["val"]) != kept(runs[""])
    accuracy = {
        change: json.loads((run.path / "metrics.json").read_text())["pooled"]["levels"]["1"][
            "balanced_accuracy"
        ]["value"]
        for change, run in runs.items()
    }
    assert accuracy[""] > 0.7
    assert accuracy["test"] < 0.3
    folds, slides = open_run(runs[""].path).folds, open_run(runs[""].path).slides
    predictions = read_predictions(runs[""].path / "predictions.csv", runs[""].tree)
    assert {p.slide_id for p in predictions} == set(folds[0].test)
    assert len(slides) == 36


def test_a_loss_that_is_not_finite_ends_the_epoch_before_it_is_judged_or_saved(
    tmp_path: Path, train_small: Callable[..., Any]
) -> None:
    with pytest.raises(UsageError, match=r"^the loss of fold 0 is (nan|inf) in epoch \d") as error:
        train_small(tmp_path / "run", lr=1e30)
    assert "lower lr" in error.value.fix
    assert not list((tmp_path / "run").rglob("best.safetensors"))


def test_epochs_trained_twice_after_a_kill_are_reported_once(tmp_path: Path) -> None:
    from hmil_fast.report.html.data import read_epochs

    log = tmp_path / "log.jsonl"
    epochs = [0, 1, 2, 3, 2, 3, 4]
    lines = [
        json.dumps({"event": "epoch", "fold": 0, "epoch": e, "loss": i})
        for i, e in enumerate(epochs)
    ]
    log.write_text("\n".join([*lines[:4], '{"event": "epo', *lines[4:]]))
    found = read_epochs(log)
    assert [r["epoch"] for r in found] == [0, 1, 2, 3, 4]
    assert [r["loss"] for r in found] == [0, 1, 4, 5, 6]
