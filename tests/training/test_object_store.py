"""Training and prediction from a store in an object store."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.cli.main import main
from hmil_fast.io.store import create_store, open_store

LEAVES = ("N", "PB", "DCIS", "IC")


@pytest.fixture
def cohort_there(s3: str, fill: Callable[..., None], cohort: Any, tmp_path: Path) -> list[str]:
    """A small cohort on the server; its arguments of `train`."""
    slides = {f"µ/s{i:02d}": (i % 4, 20 + i) for i in range(16)}
    for place in (s3, tmp_path / "here"):
        fill(create_store(place, cohort.store.spec), slides, bad=["µ/s06"])
    rows = [[slide, LEAVES[leaf]] for slide, (leaf, _) in slides.items()]
    with (tmp_path / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["slide_id", "label"], *rows])
    tree = str(cohort.path / "tree.yaml")
    return ["--store", s3, "--labels", str(tmp_path / "labels.csv"), "--tree", tree]


def test_an_epoch_of_training_and_predictions(
    cohort_there: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, s3 = str(tmp_path / "run"), cohort_there[1]
    settings = ["folds=2", "epochs=1", "baseline=none", "hidden=8", "device=cpu"]
    assert main(["train", *cohort_there, "--out", run, *settings]) == 0
    capsys.readouterr()
    assert main(["predict", run, "--store", s3]) == 0
    there = capsys.readouterr().out
    assert len(there.splitlines()) == 17
    assert main(["predict", run, "--store", str(tmp_path / "here")]) == 0
    assert capsys.readouterr().out == there


def test_every_cache_reads_the_same_bags(cohort_there: list[str], tmp_path: Path) -> None:
    there, here = open_store(cohort_there[1]), open_store(tmp_path / "here")
    ids = there.slide_ids()
    wanted = FeatureCache(here, ids, tmp_path, "host").batch([3, 6, 1], torch.device("cpu"))
    for tier in ("host", "map", "stream"):
        found = FeatureCache(there, ids, tmp_path, tier).batch([3, 6, 1], torch.device("cpu"))
        assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
