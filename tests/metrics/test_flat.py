"""Flat metrics against formulas written out here and scikit-learn's."""

import math
import warnings

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import metrics as sk

from hmil_fast.errors import UsageError
from hmil_fast.metrics import calibration_error, flat_metrics
from hmil_fast.metrics.flat import weighted_class_metrics, weighted_flat_metrics


def sample(n: int, classes: int, seed: int, ties: bool = False) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), y] += 1
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    return y, np.round(p, 1) if ties else p


def auc_by_pairs(y: NDArray, p: NDArray) -> float:
    areas = []
    for c in range(p.shape[1]):
        up, down = p[y == c, c], p[y != c, c]
        if len(up) and len(down):
            wins = [(a > b) + 0.5 * (a == b) for a in up for b in down]
            areas.append(sum(wins) / len(wins))
    return sum(areas) / len(areas)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ties", [False, True])
def test_agrees_with_scikit_learn(seed: int, ties: bool) -> None:
    y, p = sample(40, 2 + seed, seed, ties)
    predicted = p.argmax(axis=1)
    labels = list(range(p.shape[1]))
    got = flat_metrics(y, p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = {
            "auc": auc_by_pairs(y, p),
            "accuracy": sk.accuracy_score(y, predicted),
            "balanced_accuracy": sk.balanced_accuracy_score(y, predicted),
            "macro_f1": sk.f1_score(y, predicted, average="macro"),
            "specificity": np.mean(
                [sk.recall_score(y != c, predicted != c) for c in labels if (y != c).any()]
            ),
            "qwk": sk.cohen_kappa_score(y, predicted, labels=labels, weights="quadratic"),
            "brier": np.mean(
                [((p[i] - np.eye(len(labels))[c]) ** 2).sum() for i, c in enumerate(y)]
            ),
            "nll": got["nll"] if ties else sk.log_loss(y, p, labels=labels),
        }
    assert got == pytest.approx(want, abs=1e-12)


def test_auc_is_scikit_learns_where_all_classes_occur() -> None:
    y, p = sample(80, 4, 3)
    assert flat_metrics(y, p)["auc"] == pytest.approx(
        sk.roc_auc_score(y, p, multi_class="ovr", average="macro"), abs=1e-12
    )


def test_weights_are_repeats() -> None:
    y, p = sample(30, 3, 0, ties=True)
    weights = np.random.default_rng(1).integers(0, 4, (5, 30))
    got = weighted_flat_metrics(y, p, weights.astype(float))
    for row, counts in enumerate(weights):
        again = np.repeat(np.arange(30), counts)
        want = flat_metrics(y[again], p[again])
        assert {k: v[row] for k, v in got.items() if np.isfinite(v[row])} == pytest.approx(want)


def test_no_slides_have_no_metrics() -> None:
    assert flat_metrics(np.zeros(0, int), np.zeros((0, 3))) == {}
    assert calibration_error(np.zeros(0, int), np.zeros((0, 3))) is None


def test_one_slide_and_one_class_leave_auc_and_kappa_undefined() -> None:
    right = flat_metrics(np.array([1]), np.array([[0.2, 0.8]]))
    assert right.pop("brier") == pytest.approx(2 * 0.2**2)
    assert right.pop("nll") == pytest.approx(-math.log(0.8))
    # class 1 has no negatives, so no specificity; class 0's negative is not called class 0
    assert right == {"accuracy": 1, "balanced_accuracy": 1, "macro_f1": 1, "specificity": 1}
    same = flat_metrics(np.zeros(5, int), np.full((5, 3), 1 / 3))
    assert "auc" not in same
    assert "qwk" not in same
    assert same["macro_f1"] == 1


def test_absent_class_is_left_out_of_means() -> None:
    y = np.array([0, 0, 1, 1])
    p = np.array([[0.7, 0.3, 0], [0.6, 0.4, 0], [0.2, 0.8, 0], [0.9, 0.1, 0]])
    got = flat_metrics(y, p)
    assert got["balanced_accuracy"] == pytest.approx(0.75)
    assert got["auc"] == pytest.approx(0.5 * (2 / 4) + 0.5 * (2 / 4))
    assert all(math.isfinite(v) for v in got.values())


def test_probabilities_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UsageError, match="1 of 2 slides are not finite"):
        flat_metrics(np.array([0, 1]), np.array([[0.5, 0.5], [np.nan, 0.5]]))


@pytest.mark.parametrize(
    ("y", "p"),
    [([0, 3], np.ones((2, 3))), ([-1, 0], np.ones((2, 3))), ([0], np.ones((2, 3)))],
)
def test_classes_and_shapes_are_checked(y: list[int], p: NDArray) -> None:
    with pytest.raises(ValueError, match="classes"):
        flat_metrics(np.array(y), p)


def test_each_class_against_scikit_learn() -> None:
    y, p = sample(60, 4, 2)
    predicted = p.argmax(axis=1)
    got = {k: v[0] for k, v in weighted_class_metrics(y, p, np.ones((1, 60))).items()}
    precision, recall, f1, _ = sk.precision_recall_fscore_support(y, predicted)
    assert got["precision"] == pytest.approx(precision)
    assert got["recall"] == pytest.approx(recall)
    assert got["f1"] == pytest.approx(f1)
    for c in range(4):
        assert got["specificity"][c] == pytest.approx(sk.recall_score(y != c, predicted != c))
        assert got["auc"][c] == pytest.approx(sk.roc_auc_score(y == c, p[:, c]))


def test_a_class_that_no_slide_has_is_undefined() -> None:
    got = weighted_class_metrics(np.array([0, 1]), np.eye(3)[[0, 0]], np.ones((1, 2)))
    for name, values in {"recall": [1, 0, np.nan], "precision": [0.5, np.nan, np.nan]}.items():
        np.testing.assert_array_equal(got[name][0], values)
    assert got["specificity"][0].tolist() == [0, 1, 1]
    assert np.isnan(got["auc"][0, 2])
