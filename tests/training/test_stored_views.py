"""Training on the augmented views of a store, by numbers that a stop does not change."""

import dataclasses
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hmil_fast.api import train as api_train
from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.sampler import draw_views, epoch_batches
from hmil_fast.bags.splits import read_labels
from hmil_fast.cli.main import main
from hmil_fast.config import Runtime, load_config, load_runtime
from hmil_fast.errors import Stopped, StoreError, UsageError
from hmil_fast.io.store import FeatureStore, at_view, create_store, open_store
from hmil_fast.labels import LabelTree
from hmil_fast.training.loop import EpochReport, FoldTrainer, train_run


@pytest.fixture(scope="module")
def viewed(tmp_path_factory: pytest.TempPathFactory, cohort: Any) -> FeatureStore:
    """The cohort's features with two noisy views."""
    alone: FeatureStore = cohort.store
    tiling = alone.spec.tiling | {"views": {"count": 2, "seed": 0}}
    spec = dataclasses.replace(alone.spec, tiling=tiling)
    store = create_store(tmp_path_factory.mktemp("viewed") / "store", spec)
    rng = np.random.default_rng(5)
    for slide_id in alone.slide_ids():
        record, x = alone.record(slide_id), alone.features(slide_id)
        with store.writer(slide_id, record.num_tiles, record.attrs) as writer:
            for view in range(3):
                noise = 0.3 * bool(view) * rng.normal(size=x.shape)
                writer.append((x + noise).astype(x.dtype), view=view)
            jpeg = {"thumbnail.jpg": alone.file(slide_id, "thumbnail.jpg") or b""}
            writer.commit(alone.coords(slide_id), alone.status(slide_id), jpeg)
    return store


@pytest.fixture
def train(cohort: Any, settings: tuple[str, ...]) -> Callable[..., Any]:
    def train(store: FeatureStore, out: Path, *changes: str) -> Any:
        tree = LabelTree.from_yaml(cohort.path / "tree.yaml")
        slides = read_labels(cohort.path / "labels.csv", tree)
        asked = [*settings, "baseline=none", "epochs=2", "folds=2", *changes]
        return api_train.train(
            store, slides, tree, out, load_config(None, asked), runtime=load_runtime(None, asked)
        )

    return train


def weights(run: Any) -> dict[str, torch.Tensor]:
    return load_file(run.fold_path(0) / "best.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_views_are_trained_on_only_where_asked(
    viewed: FeatureStore, cohort: Any, train: Callable[..., Any], tmp_path: Path
) -> None:
    plain = train(viewed, tmp_path / "plain")
    alone = train(cohort.store, tmp_path / "alone")
    assert equal(weights(plain), weights(alone))
    run = train(viewed, tmp_path / "run", "views=2")
    assert not equal(weights(run), weights(plain))
    # on the tiles as they are, whatever store they come from
    for name, store in (("a.csv", viewed.path), ("b.csv", cohort.path / "store")):
        asked = ["predict", str(run.path), "--store", str(store), "--out", str(tmp_path / name)]
        assert main(asked) == 0
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    with pytest.raises(UsageError, match="which holds 0"):
        train(cohort.store, tmp_path / "none", "views=1")
    assert not (tmp_path / "none").exists()


def test_a_stopped_run_draws_the_same_views(
    viewed: FeatureStore, train: Callable[..., Any], tmp_path: Path
) -> None:
    whole = train(viewed, tmp_path / "whole", "views=2", "balance=leaf")
    cut = train(viewed, tmp_path / "cut", "views=2", "balance=leaf")
    for name in ("best.safetensors", "predictions.csv"):
        (cut.fold_path(0) / name).unlink()
    cache = FeatureCache(viewed, [slide.slide_id for slide in cut.slides], tmp_path, views=2)

    def stop_early(report: EpochReport) -> None:
        if report.epoch == 0:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        train_run(cut, cache, stop_early)
    train_run(cut, cache, lambda report: None)
    assert equal(weights(cut), weights(whole))


@pytest.mark.parametrize("done", [0, 1])  # steps before it was stopped
def test_a_step_gets_the_views_that_were_drawn(
    viewed: FeatureStore, train: Callable[..., Any], tmp_path: Path, monkeypatch: Any, done: int
) -> None:
    run = train(viewed, tmp_path / "run", "views=2", "epochs=1")
    ids = [slide.slide_id for slide in run.slides]
    cache = FeatureCache(viewed, ids, tmp_path, views=2)
    trainer = FoldTrainer(run, 0, cache, Runtime("cpu"), None)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(
        trainer, "train_step", lambda x, bags, y, share: seen.append((x.clone(), bags, y))
    )
    trainer.step = done
    trainer.train_epoch([])
    lengths = cache.lengths[trainer.train_bags]
    config = run.config
    seed = (config.seed, 0, 0)
    batches = epoch_batches(
        lengths, config.recipe.batch_bags, config.recipe.batch_instances, seed, None
    )
    views = draw_views(batches, 2, seed)
    assert {int(v) for view in views for v in view} == {0, 1, 2}
    assert len(batches) > 1
    for batch, view, (x, bags, y) in zip(batches[done:], views[done:], seen, strict=True):
        slides = trainer.train_bags[batch]
        assert torch.equal(y, trainer.targets[torch.from_numpy(slides)])
        for slide, v, (start, length) in zip(slides, view, bags.tolist(), strict=True):
            good = viewed.status(ids[slide]) == 0
            stored = at_view(viewed, int(v)).features(ids[slide])[good]
            np.testing.assert_array_equal(x[start : start + length].numpy(), stored)


def test_views_are_drawn_alike_and_evenly() -> None:
    batches = [[1, 2, 3], [4], [], [5, 6] * 300]
    drawn = draw_views(batches, 3, (1, 2, 0))
    assert [len(view) for view in drawn] == [3, 1, 0, 600]
    assert all(map(np.array_equal, drawn, draw_views(batches, 3, (1, 2, 0))))
    assert not np.array_equal(drawn[3], draw_views(batches, 3, (1, 2, 1))[3])
    assert np.bincount(drawn[3]).min() > 110
    assert not np.concatenate(draw_views(batches, 0, (1, 2, 0))).any()


def test_features_that_cannot_be_read_leave_no_run_folder(
    viewed: FeatureStore, train: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(viewed.path, tmp_path / "store")
    damaged = open_store(tmp_path / "store")
    for file in (damaged.path / "slides" / "s03").rglob("features/c/*/*"):
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(StoreError, match="s03"):
        train(damaged, tmp_path / "run", "baseline=mean")
    assert not (tmp_path / "run").exists()
