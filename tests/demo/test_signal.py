"""The demo's labels can be learnt from its pixels, and shuffled labels cannot."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hmil_fast.api.extract import JobOptions, extract
from hmil_fast.api.train import train
from hmil_fast.bags.splits import Slide, read_labels
from hmil_fast.cli.demo import CONFIG as DEMO
from hmil_fast.config import Runtime, load_config
from hmil_fast.demo.cohort import MPP, TILE, read_manifest, write_cohort
from hmil_fast.evaluation.evaluate import read_metrics
from hmil_fast.io.store import FeatureStore
from hmil_fast.io.tiles.grid import TileSpec
from hmil_fast.labels import LabelTree
from hmil_fast.report.attention import likeliest_first, slide_maps
from hmil_fast.runs.predictions import read_predictions

pytestmark = pytest.mark.slow
SETTINGS = ("baseline=none", "folds=4", "epochs=40", "patience=40", "lr=2e-3", "batch_bags=16",
            "hidden=64")  # fmt: skip
CPU = Runtime("cpu")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several threads wait for one another
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo(
    tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> tuple[FeatureStore, LabelTree, list[Slide]]:
    """The demo's cohort, extracted as the demo does it: half a minute on two cores."""

    cohort = write_cohort(tmp_path_factory.mktemp("demo") / "cohort")
    spec, place = TileSpec(tile_px=TILE, mpp=MPP), cohort.parent / "store"
    options = JobOptions(device="cpu", preflight=False)
    summary = extract(cohort / "slides", place, spec, options=options)
    assert summary.failed == []
    store = summary.store
    tree = LabelTree.from_yaml(cohort / "tree.yaml")
    return store, tree, read_labels(cohort / "labels.csv", tree)


def levels(demo: Any, slides: list[Slide], out: Path, **changes: Any) -> dict[str, Any]:
    store, tree, _ = demo
    words = [*SETTINGS, *(f"{name}={value}" for name, value in changes.items())]
    run = train(store, slides, tree, out, load_config(None, words), runtime=CPU)
    tested = read_predictions(run.path / "predictions.csv", tree)
    assert {p.slide_id for p in tested} == {s.slide_id for s in slides}
    return dict(read_metrics(run)["pooled"]["levels"])


def shuffled(slides: list[Slide], seed: int) -> list[Slide]:
    order = np.random.default_rng(seed).permutation(len(slides))
    labels = [slides[i].label for i in order]
    return [dataclasses.replace(s, label=l) for s, l in zip(slides, labels, strict=True)]


def test_every_slide_has_its_tiles(demo: Any) -> None:
    store, _, slides = demo
    assert sorted(s.slide_id for s in slides) == store.slide_ids()
    for slide in slides:
        assert 28 <= store.record(slide.slide_id).num_tiles <= 32
        assert not store.status(slide.slide_id).any()


def test_true_labels_are_learnt_and_shuffled_labels_are_not(demo: Any, tmp_path: Path) -> None:
    *_, slides = demo
    true = levels(demo, slides, tmp_path / "true", model="mean")
    assert true["0"]["auc"]["value"] >= 0.8
    assert true["1"]["auc"]["value"] >= 0.7
    chance = [
        levels(demo, shuffled(slides, seed), tmp_path / str(seed), model="mean")
        for seed in range(4)
    ]
    # 22 against 42 slides: the AUC of chance has a deviation of 0.08, the mean of four 0.04
    for level in ("0", "1"):
        found = [each[level]["auc"]["value"] for each in chance]
        assert abs(np.mean(found) - 0.5) < 0.12, found
        assert max(found) < true[level]["auc"]["value"]


def test_hmil_learns_the_true_labels(demo: Any, tmp_path: Path) -> None:
    *_, slides = demo
    found = levels(demo, slides, tmp_path / "run", model="hmil", epochs=25, dropout=0.25)
    assert found["0"]["auc"]["value"] >= 0.7
    assert found["0"]["auc"]["low"] > 0.5


def test_the_maps_find_the_tumour_tiles(demo: Any, tmp_path: Path) -> None:
    store, tree, slides = demo
    found: dict[str, list[float]] = {}
    for seed in range(2):
        recipe = dataclasses.replace(DEMO.recipe, epochs=20)
        config = dataclasses.replace(DEMO, recipe=recipe, baseline="none", seed=seed)
        run = train(store, slides, tree, tmp_path / str(seed), config, runtime=CPU)
        for slide_id, tiles in read_manifest().items():
            tumour = {(tile.col, tile.row): tile.tumour for tile in tiles}
            cells = (store.coords(slide_id).astype(np.int64) // TILE).tolist()
            truth = [tumour[col, row] for col, row in cells]
            if not any(truth):
                continue
            prediction, maps = slide_maps(run, store, slide_id)
            assert [(m.level, m.node) for m in maps] == list(tree.nodes)
            answer = maps[likeliest_first(tree, prediction, maps)[0]]
            found.setdefault(f"answer {seed}", []).append(roc_auc_score(truth, answer.weights))
            for m in maps:
                name = tree.title(m.level, m.node)
                found.setdefault(name, []).append(roc_auc_score(truth, m.weights))
    auc = {name: float(np.mean(values)) for name, values in found.items()}
    # seeds 0 to 3: 0.82 to 0.84 for the answer, 0.71 to 0.86 for a node; the map that `negative`
    # would have on the coarse level has 0.15 to 0.25
    assert min(auc[f"answer {seed}"] for seed in range(2)) > 0.75, auc
    assert min(auc.values()) > 0.65, auc
