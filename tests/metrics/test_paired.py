"""Paired tests: against enumerated permutations, and on models that are alike or not."""

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from hmil_fast.labels import LabelTree
from hmil_fast.metrics import (
    all_levels,
    decide,
    flat_metrics,
    holm,
    paired_comparison,
    tree_metrics,
)

TREE = LabelTree.from_nested({"benign": ["a", "b"], "malignant": ["c", "d"]})


def model(y: NDArray, signal: float, seed: int) -> NDArray:
    rng = np.random.default_rng(seed)
    p = np.exp(rng.normal(size=(len(y), 4)) + signal * np.eye(4)[y])
    p /= p.sum(axis=1, keepdims=True)
    return p


def labels(n: int) -> tuple[NDArray, list[str]]:
    return np.random.default_rng(9).integers(0, 4, n), [f"p{i // 2}" for i in range(n)]


def test_values_are_those_of_the_single_metrics() -> None:
    y, patients = labels(50)
    a, b = model(y, 1, 1), model(y, 2, 2)
    got = paired_comparison(TREE, y, (a, b), patients, draws=50)
    for side, p in (("first", a), ("second", b)):
        for level, answer in enumerate(decide(TREE, p).nodes):
            true = TREE.ancestors()[level][y]
            for name, value in flat_metrics(true, all_levels(TREE, p)[level], answer).items():
                assert getattr(got[f"{level}/{name}"], side) == pytest.approx(value)
        for name, value in tree_metrics(TREE, y, p).items():
            assert getattr(got[f"tree/{name}"], side) == pytest.approx(value)
    for cell in got.values():
        assert cell.difference == pytest.approx(cell.second - cell.first)


def test_p_is_the_share_of_enumerated_swaps() -> None:
    y, _ = labels(16)
    patients = [f"p{i // 2}" for i in range(16)]  # 8 patients, 256 ways to swap
    a, b = model(y, 0.5, 3), model(y, 1.5, 4)
    got = paired_comparison(TREE, y, (a, b), patients, draws=6000)

    def difference(swap: tuple[int, ...]) -> tuple[float, float]:
        take = np.array(swap)[np.arange(16) // 2][:, None] == 1
        one, two = np.where(take, b, a), np.where(take, a, b)
        first, second = (flat_metrics(y, p, decide(TREE, p).nodes[-1]) for p in (one, two))
        ranks = [p.argsort(axis=0).argsort(axis=0) for p in (a, b)]
        auc = [
            flat_metrics(y, np.where(take, ranks[1 - i], ranks[i]).astype(float))["auc"]
            for i in (0, 1)
        ]
        return second["accuracy"] - first["accuracy"], auc[1] - auc[0]

    every = np.array([difference(swap) for swap in product((0, 1), repeat=8)])
    for name, column in (("accuracy", every[:, 0]), ("auc", every[:, 1])):
        want = (np.abs(column) >= abs(column[0]) - 1e-12).mean()
        assert got[f"1/{name}"].p == pytest.approx(want, abs=0.025), name


def test_a_better_model_is_told_from_an_equal_one() -> None:
    y, patients = labels(160)
    base = model(y, 1.5, 5)
    better = paired_comparison(TREE, y, (base, model(y, 4, 6)), patients, draws=400)
    for name in ("1/balanced_accuracy", "0/auc", "tree/hierarchical_f1"):
        assert 1 / 401 <= better[name].p < 0.01  # the order seen is one of those drawn
        assert 0 < better[name].low < better[name].difference < better[name].high
    assert better["1/nll"].high < 0
    same = paired_comparison(TREE, y, (base, base), patients, draws=100)
    assert all((c.difference, c.low, c.high, c.p) == (0, 0, 0, 1) for c in same.values())


def test_a_model_that_leans_to_a_class_hides_no_difference_of_the_auc() -> None:
    """What moves all scores of a model alike moves neither its AUC nor the p value of it."""
    tree = LabelTree.from_nested(["no", "yes"])
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 100)
    z = [(y - 0.5) * signal + rng.normal(size=100) for signal in (0.5, 2)]
    found = []
    for lean in (0, 6):
        pair = [1 / (1 + np.exp(-x - by)) for x, by in zip(z, (-lean, lean), strict=True)]
        models = tuple(np.stack([1 - p, p], 1) for p in pair)
        found.append(paired_comparison(tree, y, models, list(map(str, range(100))), draws=400))
    assert found[0]["0/auc"].difference == pytest.approx(found[1]["0/auc"].difference)
    assert found[0]["0/auc"].p == found[1]["0/auc"].p < 0.01


def test_p_values_of_equal_models_are_uniform() -> None:
    p = []
    for seed in range(80):
        y = np.random.default_rng(seed).integers(0, 4, 60)
        pair = (model(y, 1.5, 1000 + seed), model(y, 1.5, 2000 + seed))
        p.append(
            paired_comparison(TREE, y, pair, list(map(str, y * 0 + np.arange(60))), draws=99)[
                "1/auc"
            ].p
        )
    assert 0.01 < np.mean(np.array(p) <= 0.2) < 0.36
    assert 0.4 < np.mean(p) < 0.6


def test_one_patient_allows_no_test() -> None:
    y, _ = labels(10)
    got = paired_comparison(TREE, y, (model(y, 1, 1), model(y, 1, 2)), ["p"] * 10, draws=50)
    assert {(c.low, c.high, c.p) for c in got.values()} == {(None, None, None)}


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.6}) == pytest.approx(
        {"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.6}
    )
    assert holm({}) == {}
    assert holm({"a": 0.7, "b": 0.8})["b"] == 1
