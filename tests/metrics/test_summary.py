"""Intervals and the structure of metrics.json."""

import importlib
import json

import numpy as np
import pytest
from numpy.typing import NDArray

from hmil_fast.labels import LabelTree
from hmil_fast.metrics import (
    bootstrap,
    decide,
    evaluate_predictions,
    flat_metrics,
    rates,
    tree_metrics,
)

TREE = LabelTree.from_nested({"benign": ["a", "b"], "malignant": ["c", "d", "e"]})


def predictions(n: int, seed: int = 0) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 5, n)
    p = rng.dirichlet(np.ones(5), n) + np.eye(5)[y] * 0.3
    p /= p.sum(axis=1, keepdims=True)
    return y, p


def test_interval_of_a_mean_is_the_textbook_one() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    got = bootstrap(
        lambda w: {"mean": w @ values / w.sum(axis=1)}, [str(i) for i in range(400)], n=4000
    )["mean"]
    spread = values.std() / np.sqrt(400)
    assert got.low == pytest.approx(values.mean() - 1.96 * spread, abs=0.15 * spread)
    assert got.high == pytest.approx(values.mean() + 1.96 * spread, abs=0.15 * spread)


def test_slides_of_a_patient_are_drawn_together() -> None:
    values = np.repeat([0.0, 1.0] * 10, 5)
    patients = np.repeat([f"p{i}" for i in range(20)], 5)

    def mean(weights: NDArray) -> dict[str, NDArray]:
        for p in np.unique(patients):
            assert (np.ptp(weights[:, patients == p], axis=1) == 0).all()
        return {"mean": weights @ values / weights.sum(axis=1)}

    by_patient = bootstrap(mean, list(patients))["mean"]
    by_slide = bootstrap(
        lambda w: {"mean": w @ values / w.sum(axis=1)}, [str(i) for i in range(100)]
    )["mean"]
    assert by_patient.high - by_patient.low > 1.8 * (by_slide.high - by_slide.low)


def test_undefined_draws_are_left_out_and_counted() -> None:
    values = np.array([1.0, 0, 0, 0])

    def share(weights: NDArray) -> dict[str, NDArray]:
        hit = weights @ values
        return {"share": np.where(hit > 0, 1.0, np.nan), "never": np.full(len(hit), np.nan)}

    got = bootstrap(share, list("abcd"), n=2000, seed=3)
    assert got["share"][:2] == (1.0, 1.0)
    assert got["share"].undefined == pytest.approx(2000 * 0.75**4, rel=0.1)
    assert got["never"] == (None, None, 2000)


def test_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    y, p = predictions(40)
    patients = [f"p{i % 13}" for i in range(40)]
    whole = evaluate_predictions(TREE, y, p, patients, seed=5)
    module = importlib.import_module("hmil_fast.metrics.bootstrap")  # the function hides it
    monkeypatch.setattr(module, "_BLOCK", 700)
    parts = evaluate_predictions(TREE, y, p, patients, seed=5)
    for level, cells in whole["levels"].items():
        for name, cell in cells.items():
            assert parts["levels"][level][name] == pytest.approx(cell)


def test_values_are_those_of_the_single_metrics_and_lie_in_their_intervals() -> None:
    y, p = predictions(70)
    got = evaluate_predictions(TREE, y, p, [f"p{i // 2}" for i in range(70)])
    levels = [np.stack([p[:, :2].sum(1), p[:, 2:].sum(1)], 1), p]
    up, answers = TREE.ancestors(), decide(TREE, p).nodes
    for level in range(2):
        cells = dict(got["levels"][str(level)])
        assert cells.pop("ece")["low"] is None
        assert cells.pop("ece_adaptive")["low"] is None
        want = flat_metrics(up[level][y], levels[level], answers[level])
        assert {k: c["value"] for k, c in cells.items()} == pytest.approx(want)
        assert all(c["low"] < c["value"] < c["high"] for c in cells.values())
        for k, name in enumerate(TREE.names[level]):
            of_class = got["classes"][str(level)][name]
            assert of_class["slides"] == (up[level][y] == k).sum()
            said = answers[level][up[level][y] != k]
            assert of_class["specificity"]["value"] == pytest.approx((said != k).mean())
            assert of_class["recall"]["low"] <= of_class["recall"]["value"]
        counts = np.array(got["confusion"][str(level)])
        assert counts.trace() == (up[level][y] == answers[level]).sum()
        assert counts.sum(axis=1).tolist() == np.bincount(up[level][y]).tolist()
    want = tree_metrics(TREE, y, p)
    assert {k: c["value"] for k, c in got["tree"].items()} == pytest.approx(want)
    assert (got["slides"], got["patients"]) == (70, 35)
    json.dumps(got, allow_nan=False)


def test_seed_decides() -> None:
    y, p = predictions(30)
    patients = [str(i) for i in range(30)]
    first, again, other = (evaluate_predictions(TREE, y, p, patients, s) for s in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_slides_give_a_plain_answer(n: int) -> None:
    y, p = predictions(n)
    got = evaluate_predictions(TREE, y, p, ["same"] * n)
    json.dumps(got, allow_nan=False)
    assert got["slides"] == n
    assert all(c["low"] is None for c in got["tree"].values())


def test_no_draws_no_intervals() -> None:
    y, p = predictions(20)
    got = evaluate_predictions(TREE, y, p, [str(i) for i in range(20)], draws=0)
    assert got["levels"]["1"]["accuracy"]["low"] is None


def test_arrays_that_miss_the_tree_are_refused() -> None:
    y, p = predictions(20)
    with pytest.raises(ValueError, match="leaf probabilities"):
        evaluate_predictions(TREE, y, p[:, :2], ["p"] * 20)
    with pytest.raises(ValueError, match="true nodes"):
        evaluate_predictions(TREE, y[:3], p, ["p"] * 20)


def test_a_coarse_label_counts_on_the_levels_that_it_names() -> None:
    y, p = predictions(60)
    patients = [str(i) for i in range(60)]
    nodes = TREE.ancestors()[:, y]
    coarse = np.arange(60) % 3 == 0
    nodes[1, coarse] = -1
    got = evaluate_predictions(TREE, nodes, p, patients, draws=50)
    fine = evaluate_predictions(TREE, y[~coarse], p[~coarse], patients[:40], draws=0)
    whole = evaluate_predictions(TREE, y, p, patients, draws=50)
    assert got["levels"]["0"] == whole["levels"]["0"]
    assert np.sum(got["confusion"]["1"]) == 40
    for where in ("levels", "tree"):
        a, b = (r[where]["1"] if where == "levels" else r[where] for r in (got, fine))
        assert {k: c["value"] for k, c in a.items()} == pytest.approx(
            {k: c["value"] for k, c in b.items()}
        )
    nodes[1] = -1
    none = evaluate_predictions(TREE, nodes, p, patients, draws=50)
    assert none["levels"]["1"] == {}
    assert none["tree"] == {}
    json.dumps(none, allow_nan=False)


def test_rates_are_those_of_the_second_of_two_nodes() -> None:
    y, p = predictions(60)
    got = evaluate_predictions(TREE, y, p, [str(i) for i in range(60)], draws=0)
    paths = {heading: path for heading, *path in rates(got, "0")}
    assert list(paths) == ["sensitivity (malignant)", "specificity (malignant)"]
    assert paths["sensitivity (malignant)"] == ["classes", "0", "malignant", "recall"]
    assert rates(got, "1") == []
