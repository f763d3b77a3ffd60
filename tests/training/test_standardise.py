"""Features whose columns differ by orders of magnitude: noticed, and brought to one scale."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.cli.main import main
from hmil_fast.evaluation.predict import load_fold
from hmil_fast.io.store import FeatureStore, StoreSpec, create_store, open_store
from hmil_fast.runs.run import open_run
from hmil_fast.training.standardise import fit_scale

SIZES = np.array([1e-3, 1e-3, 1e-3, 1e-3, *[1.0] * 6, *[3e3] * 4, 1.0, 0.0])
CENTRE = np.array([*[0.0] * 10, *[9e3] * 4, 0.0, 7.0])


def write(path: Path, bags: Sequence[np.ndarray], statuses: dict[int, Any] | None = None) -> Any:
    store = create_store(path, StoreSpec(bags[0].shape[1], "float32", {"name": "x"}, {}))
    for i, x in enumerate(bags):
        status = (statuses or {}).get(i, np.zeros(len(x), np.uint8))
        with store.writer(f"s{i}", len(x), {}) as writer:
            writer.append(x.astype(np.float32))
            writer.commit(np.zeros((len(x), 2), np.int64), status)
    return store


def test_means_and_deviations_are_those_of_the_training_bags(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(n, 16)) * SIZES + CENTRE for n in (40, 0, 30, 50)]
    status = np.zeros(30, np.uint8)
    status[:5], bags[2][:5] = 1, 0
    store = write(tmp_path / "store", bags, {2: status})
    cache = FeatureCache(store, store.slide_ids(), tmp_path)
    scale, apart = fit_scale(cache, [0, 1, 2])
    x = np.concatenate([bags[0], bags[2][5:]]).astype(np.float32).astype(float)
    np.testing.assert_allclose(scale.mean, x.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scale.factor[:15], 1 / x.std(0)[:15], rtol=1e-4)
    assert scale.factor[15] == 0
    assert apart > 1e5
    shown = scale(torch.from_numpy(x))
    assert not shown[:, 15].any()
    np.testing.assert_allclose(shown[:, :15].std(0, correction=0), 1, rtol=1e-3)
    assert fit_scale(cache, [1])[1] == 1


def test_columns_of_an_encoder_are_taken_as_they_are(run: Any) -> None:
    notes = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    folds = [note for note in notes if note["event"] == "fold"]
    assert folds
    for note in folds:
        assert note["columns"]["apart"] < 5
        assert not note["columns"]["standardised"]
    assert "differ in size" not in run.printed.stderr


@pytest.fixture(scope="module")
def apart(cohort: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """The cohort with its signal in small columns, beside large ones that say nothing."""
    bags = [
        cohort.store.features(slide_id).astype(np.float64) * SIZES + CENTRE
        for slide_id in cohort.slides
    ]
    path = tmp_path_factory.mktemp("apart") / "store"
    store = create_store(path, StoreSpec(16, "float32", {"name": "planted"}, {}))
    for slide_id, x in zip(cohort.slides, bags, strict=True):
        with store.writer(slide_id, len(x), cohort.store.record(slide_id).attrs) as writer:
            writer.append(x.astype(np.float32))
            thumbnail = cohort.store.file(slide_id, "thumbnail.jpg")
            writer.commit(
                cohort.store.coords(slide_id),
                cohort.store.status(slide_id),
                {"thumbnail.jpg": thumbnail},
            )
    return store


@pytest.fixture(scope="module")
def train_apart(
    cohort: Any, apart: FeatureStore, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    def train(*settings: str) -> Path:
        out = tmp_path_factory.mktemp("runs") / "run"
        given = {"store": apart.path, "labels": cohort.path / "labels.csv"}
        given |= {"tree": cohort.path / "tree.yaml", "out": out}
        plain = ("folds=2", "epochs=25", "batch_bags=8", "hidden=24", "precision=fp32")
        more = ("device=cpu", "baseline=none", *settings)
        assert main(["train", *(f"--{k}={v}" for k, v in given.items()), *plain, *more]) == 0
        return out

    return train


@pytest.fixture(scope="module")
def scaled_run(train_apart: Callable[..., Path]) -> Path:
    return train_apart()


def leaf_accuracy(run: Path) -> float:
    metrics = json.loads((run / "metrics.json").read_text())["pooled"]["levels"]["1"]
    return float(metrics["balanced_accuracy"]["value"])


@pytest.mark.slow
def test_one_scale_finds_what_large_columns_hide(
    scaled_run: Path, train_apart: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    raw = train_apart("standardise=none")
    said = " ".join(capsys.readouterr().err.split())
    assert "differ in size by a factor of" in said
    assert "standardise=auto brings them to one scale" in said
    assert leaf_accuracy(scaled_run) > leaf_accuracy(raw) + 0.3
    log = (scaled_run / "log.jsonl").read_text().splitlines()
    folds = [note for note in map(json.loads, log) if note["event"] == "fold"]
    assert [note["columns"]["standardised"] for note in folds] == [True, True]


def table(text: str) -> dict[str, list[float]]:
    """The probabilities of both levels by slide."""
    return {
        row["slide_id"]: [float(v) for name, v in row.items() if re.match(r"p\d_", name)]
        for row in csv.DictReader(text.splitlines())
    }


@pytest.mark.slow
def test_every_command_sees_the_scale_of_the_checkpoint(
    scaled_run: Path,
    apart: FeatureStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(scaled_run, tmp_path / "run")
    store = ["--store", str(apart.path)]
    said = table((scaled_run / "predictions.csv").read_text())
    assert main(["predict", str(scaled_run), *store]) == 0
    found = table(capsys.readouterr().out)
    for slide_id, p in said.items():
        np.testing.assert_allclose(found[slide_id], p, atol=1e-5)
    # bags that go in chunks, from the store
    settings = (tmp_path / "run" / "config.yaml").read_text()
    small = settings.replace("batch_instances: 262144", "batch_instances: 8")
    (tmp_path / "run" / "config.yaml").write_text(small.replace("cache: auto", "cache: stream"))
    assert main(["predict", str(tmp_path / "run"), *store]) == 0
    for slide_id, p in table(capsys.readouterr().out).items():
        np.testing.assert_allclose(p, said[slide_id], atol=1e-4)
    for fold in range(2):
        scale = load_fold(open_run(scaled_run), fold, torch.device("cpu")).feature_scale
        assert scale.mean[10:14].min() > 8e3
        assert not torch.equal(
            scale.mean,
            load_fold(open_run(scaled_run), 1 - fold, torch.device("cpu")).feature_scale.mean,
        )
    validation = (tmp_path / "run" / "fold-0" / "val_predictions.csv").read_text()
    (tmp_path / "run" / "fold-0" / "val_predictions.csv").unlink()
    shutil.copy(scaled_run / "config.yaml", tmp_path / "run" / "config.yaml")
    assert main(["evaluate", str(tmp_path / "run"), *store]) == 0
    again = table((tmp_path / "run" / "fold-0" / "val_predictions.csv").read_text())
    for slide_id, p in table(validation).items():
        np.testing.assert_allclose(again[slide_id], p, atol=1e-5)
    capsys.readouterr()
    picture = str(tmp_path / "x.png")
    assert main(["heatmap", str(scaled_run), "s00", *store, "--out", picture]) == 0
    best = max(said["s00"][2:6])
    assert f"{best:.2f}" in capsys.readouterr().out


@pytest.mark.slow
def test_exported_heads_take_features_as_they_are(
    scaled_run: Path, apart: FeatureStore, tmp_path: Path
) -> None:
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert main(["export", str(scaled_run), "--out", str(tmp_path)]) == 0
    text = (scaled_run / "predictions.csv").read_text()
    slide_id, _, fold = text.splitlines()[1].split(",")[:3]
    session = ort.InferenceSession(str(tmp_path / f"fold-{fold}.onnx"))
    store = open_store(apart.path)
    x = store.features(slide_id)[store.status(slide_id) == 0]
    (found,) = session.run(["probabilities_1"], {"x": x})
    np.testing.assert_allclose(found, table(text)[slide_id][2:6], atol=1e-3)
