"""Slides that are one under two ids; folds that would train on one and test on the other."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hmil_fast.bags.duplicates import near_duplicates, same_features
from hmil_fast.bags.fold import Fold, separated_pairs
from hmil_fast.bags.manifest import Manifest, read_manifest, sources, versions, write_splits
from hmil_fast.bags.splits import Slide
from hmil_fast.errors import UsageError
from hmil_fast.io.store import FeatureStore, StoreSpec, create_store
from hmil_fast.labels import LabelTree


def fill(store: FeatureStore, slides: dict[str, NDArray]) -> None:
    for slide_id, x in slides.items():
        attrs = {"tile_px_level0": 64.0, "level0_size": [640, 640], "mpp": {"level0": 0.5}}
        with store.writer(slide_id, len(x), attrs) as writer:
            writer.append(x.astype(np.float16))
            writer.commit(np.zeros((len(x), 2), np.int64), np.zeros(len(x), np.uint8))


def test_copies_are_found_by_their_content(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 9, 4))
    store = create_store(tmp_path / "s", StoreSpec(4, "float16", {"name": "x"}, {"tile_px": 64}))
    none = np.zeros((0, 4))
    fill(store, {"a": a, "b": b, "a2": a, "empty1": none, "empty2": none, "a3": a})
    copies = same_features(store, store.slide_ids())
    assert copies == [("a", "a2"), ("a", "a3"), ("a2", "a3")]
    # a fold may lack the first of them
    assert separated_pairs([Fold(("a2",), ("b",), ("a3",))], copies) == [
        "a2 (train) and a3 (test) in fold 0"
    ]
    folds = [Fold(("a", "b"), ("a2",), ("a3",)), Fold(("b",), (), ("a", "a2"))]
    assert separated_pairs(folds, [("a", "a2")]) == ["a (train) and a2 (val) in fold 0"]
    assert separated_pairs(folds[1:], [("a", "a2"), ("a", "a3")]) == []

    tree = LabelTree.from_nested({"x": ["N", "PB"], "y": ["IC"]})
    slides = [Slide("a", "N", "P"), Slide("b", "IC", "Q")]
    now = sources(tree, slides, store)
    assert sources(tree, slides[::-1], store) == now
    changed = {
        "labels": sources(tree, [Slide("a", "PB", "P"), slides[1]], store),
        "tree": sources(LabelTree.from_nested({"x": ["N"], "y": ["IC", "PB"]}), slides, store),
    }
    for name, other in changed.items():
        assert {key for key in now if now[key] != other[key]} == {name}
    other = create_store(tmp_path / "t", StoreSpec(4, "float16", {"name": "y"}, {"tile_px": 64}))
    fill(other, {"a": a, "b": b + 1})
    assert {k for k, v in sources(tree, slides, other).items() if v != now[k]} == {
        "store", "features",
    }  # fmt: skip
    path = tmp_path / "splits.json"
    write_splits(path, [Fold(("a",), (), ("b",))], slides, now)
    folds = [Fold(("a",), (), ("b",))]
    assert read_manifest(path) == Manifest(folds, slides, now, versions())
    path.write_text(path.read_text().replace(now["tree"], now["slides"]))
    with pytest.raises(UsageError, match="changed after it was written"):
        read_manifest(path)


def test_near_duplicates_stand_out_from_the_cohorts_mean(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    # all slides look alike but for a little: cosines as they stand are above 0.999
    means = 30 + rng.normal(size=(1500, 32)) * 0.5
    means[1400] = means[3] + rng.normal(size=32) * 0.002
    means[700] = means[701]
    # moved by 0.06 of its distance to the mean: a centred cosine of 0.998 is another slide
    across = rng.normal(size=32)
    away = means[9] - 30
    across -= away * (across @ away) / (away @ away)
    means[1300] = means[9] + across * 0.06 * np.linalg.norm(away) / np.linalg.norm(across)
    ids = [f"s{i}" for i in range(1500)]
    assert near_duplicates(means.astype(np.float32), ids) == [("s3", "s1400"), ("s700", "s701")]
    assert near_duplicates(np.ones((5, 8)), ids[:5]) == []
