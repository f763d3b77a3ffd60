"""A run on one scale of a store that has several is the run on a store of that scale alone."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hmil_fast.api.train import train
from hmil_fast.cli.main import main
from hmil_fast.config import load_config, load_runtime
from hmil_fast.errors import UsageError
from hmil_fast.io.store import FeatureStore, StoreSpec, at_scale, create_store
from hmil_fast.runs.predictions import read_predictions

DRAWN = {"level0_size": [512, 512], "mpp": {"level0": 0.5}}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, cohort: Any) -> FeatureStore:
    """The cohort's features at 1 µm per px, beside noise of more and smaller tiles at 0.5."""
    alone: FeatureStore = cohort.store
    tiling = alone.spec.tiling | {"coarser": [1.0]}
    spec = dataclasses.replace(alone.spec, tiling=tiling)
    store = create_store(tmp_path_factory.mktemp("scales") / "store", spec)
    rng = np.random.default_rng(5)
    for slide_id in alone.slide_ids():
        coarse, n = alone.record(slide_id), alone.record(slide_id).num_tiles
        fine = np.repeat(np.arange(n), 4)
        facts = DRAWN | {"tile_px_level0": 32.0}
        with store.writer(slide_id, 4 * n, facts, [(n, coarse.attrs)]) as writer:
            writer.append(rng.normal(size=(4 * n, spec.dim)).astype(spec.stored_dtype))
            writer.append(alone.features(slide_id), 1)
            at = alone.coords(slide_id)
            corners = at[fine] + np.tile([[0, 0], [32, 0], [0, 32], [32, 32]], (n, 1))
            status = np.concatenate([np.zeros(4 * n, np.uint8), alone.status(slide_id)])
            jpeg = {"thumbnail.jpg": alone.file(slide_id, "thumbnail.jpg") or b""}
            writer.commit(np.concatenate([corners, at]), status, jpeg, fine)
    return store


def copy_of(store: FeatureStore, path: Path, spec: StoreSpec) -> FeatureStore:
    copy = create_store(path, spec)
    for slide_id in store.slide_ids():
        record = store.record(slide_id)
        with copy.writer(slide_id, record.num_tiles, record.attrs) as writer:
            writer.append(store.features(slide_id))
            jpeg = {"thumbnail.jpg": store.file(slide_id, "thumbnail.jpg") or b""}
            writer.commit(store.coords(slide_id), store.status(slide_id), jpeg)
    return copy


@pytest.fixture
def train_at(cohort: Any, settings: tuple[str, ...], tmp_path: Path) -> Callable[..., Any]:
    """Train on a store with one more setting, into a folder of this name."""

    def train_at(store: FeatureStore, name: str, word: str) -> Any:
        words = [*settings, word, "epochs=2", "baseline=none"]
        tables = (cohort.path / "labels.csv", cohort.path / "tree.yaml")
        config, runtime = load_config(None, words), load_runtime(None, words)
        return train(store, *tables, tmp_path / name, config, runtime=runtime)

    return train_at


@pytest.mark.slow
def test_a_run_is_of_the_scale_it_asks_for(
    several: FeatureStore,
    cohort: Any,
    train_at: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train_at(several, "run", "mpp=1")
    assert run.store["tiling"]["mpp"] == 1.0
    card = json.loads((tmp_path / "run/fold-0/model_card.json").read_text())
    assert card["features"]["tiling"]["mpp"] == 1.0
    coarse = at_scale(several, 1.0)
    alone = copy_of(coarse, tmp_path / "alone", coarse.spec)
    train_at(alone, "other", "mpp=1")
    told = [(tmp_path / name / "predictions.csv").read_text() for name in ("run", "other")]
    assert told[0] == told[1]

    made = []
    for store in (several, alone):
        where = ["--store", str(store.path), "--out"]
        ids = ["s00", "s06"]
        assert main(["predict", str(run.path), *ids, *where, str(tmp_path / "p.csv")]) == 0
        assert main(["heatmap", str(run.path), "s00", *where, str(tmp_path / "h.png")]) == 0
        made.append([(tmp_path / name).read_bytes() for name in ("p.csv", "h.png")])
    assert main(["report", str(run.path), "--store", str(several.path), "--heatmaps", "1"]) == 0
    assert made[0] == made[1]

    capsys.readouterr()
    elsewhere = create_store(tmp_path / "half", cohort.store.spec)  # of 0.5 µm per px alone
    assert main(["predict", str(run.path), "--store", str(elsewhere.path)]) == 2
    assert "tiling.mpp is 0.5, was 1.0" in capsys.readouterr().err
    tiling = {name: value for name, value in alone.spec.tiling.items() if name != "around"}
    by_itself = dataclasses.replace(alone.spec, tiling=tiling)
    with pytest.raises(
        UsageError, match=r"are laid by themselves, .* around those at 0\.5"
    ) as said:
        run.at_run_scales(create_store(tmp_path / "by-itself", by_itself))
    assert "the same list of --mpp" in said.value.fix


def test_a_run_on_all_scales(
    several: FeatureStore,
    cohort: Any,
    train_at: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train_at(several, "run", "scales=all")
    assert run.store["dim"] == 2 * several.spec.dim
    assert run.store["tiling"]["coarser"] == [1.0]
    where = ["--store", str(several.path), "--out"]
    assert main(["predict", str(run.path), "s00", *where, str(tmp_path / "p.csv")]) == 0
    (ours,) = read_predictions(tmp_path / "p.csv", run.tree)
    told = {p.slide_id: p for p in read_predictions(run.path / "predictions.csv", run.tree)}
    for a, b in zip(ours.probabilities, told["s00"].probabilities, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert main(["heatmap", str(run.path), "s06", *where, str(tmp_path / "h.png")]) == 0
    assert main(["predict", str(run.path), "--store", str(cohort.path / "store")]) == 2
    assert "has one scale, there is nothing to join" in capsys.readouterr().err


def test_the_finest_scale_is_the_default(
    several: FeatureStore, train_small: Callable[..., Any], cohort: Any, tmp_path: Path
) -> None:
    run = train_small(tmp_path / "run", epochs=1)
    fine = run.at_run_scales(several)  # a run on a store of 0.5 alone takes these slides too
    assert fine.record("s00").num_tiles == 4 * cohort.store.record("s00").num_tiles


def test_a_scale_that_is_not_there_is_named(
    several: FeatureStore, cohort: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*cohort.arguments, "--out", str(tmp_path / "run"), "--mpp", "2"]
    arguments[1] = str(several.path)
    assert main(["train", *arguments, "device=cpu"]) == 2
    assert "no features at 2 µm per px, its scales are 0.5 and 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
