"""Calibration errors by hand, and temperatures on logits whose right temperature is known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from hmil_fast.metrics import (
    adaptive_calibration_error,
    calibration_error,
    calibration_scores,
    fit_temperature,
    reliability_bins,
    with_temperature,
)


def softmax(z: NDArray) -> NDArray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def drawn(n: int, seed: int) -> tuple[NDArray, NDArray]:
    """Slides whose labels are drawn from their own probabilities: calibrated by construction."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 4)) * 2
    p = softmax(logits)
    y = (p.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return y, logits


def test_calibration_error_by_hand() -> None:
    p = np.array([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [1.0, 0.0]])
    y = np.array([0, 1, 1, 0])
    # bins: 0.6–0.7 holds slide 2; 0.9–1.0 the others, 2 of 3 right at a mean of 0.9667
    assert calibration_error(y, p) == pytest.approx((abs(1 - 0.65) + 3 * abs(2 / 3 - 2.9 / 3)) / 4)
    _, mean, accuracy, count = reliability_bins(y, p)
    assert count.tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0, 3]
    assert mean[6] == pytest.approx(0.65)
    assert accuracy[9] == pytest.approx(2 / 3)
    # fewer slides than bins: each is a bin of its own
    want = (0.05 + 0.95 + 0.35 + 0) / 4
    assert adaptive_calibration_error(y, p) == pytest.approx(want)


def test_bins_of_equal_count() -> None:
    y, logits = drawn(1000, 0)
    p = softmax(logits)
    order = np.argsort(p.max(axis=1))
    parts = order.reshape(10, 100)
    hits = p.argmax(axis=1) == y
    want = np.mean([abs(p.max(axis=1)[i].mean() - hits[i].mean()) for i in parts])
    assert adaptive_calibration_error(y, p) == pytest.approx(want)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_was_taken_away_is_found(temperature: float) -> None:
    y, logits = drawn(4000, 1)
    p = softmax(logits * temperature)
    found = fit_temperature(y, p)
    assert found == pytest.approx(temperature, rel=0.1)
    mended = with_temperature(p, found)
    np.testing.assert_allclose(mended, softmax(logits * temperature / found), atol=1e-9)
    if temperature == 3.0:
        before, after = calibration_scores(y, p), calibration_scores(y, mended)
        assert all(after[name] < before[name] for name in before)
        assert after["ece"] < 0.03


def test_a_few_slides_that_are_all_right_ask_for_no_extreme() -> None:
    p = np.full((6, 3), 0.05)
    p[np.arange(6), np.arange(6) % 3] = 0.9
    assert 0.6 < fit_temperature(np.arange(6) % 3, p) < 1
    assert 1 < fit_temperature((np.arange(6) + 1) % 3, p) < 5
    assert fit_temperature(np.zeros(0, int), np.zeros((0, 3))) == 1


def test_zeros_stay_finite() -> None:
    p = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert np.isfinite(fit_temperature(np.array([0, 0]), p))
    mended = with_temperature(p, 2.5)
    assert np.isfinite(mended).all()
    assert mended.sum(axis=1) == pytest.approx(1)


def test_no_slides_have_no_scores() -> None:
    assert calibration_scores(np.zeros(0, int), np.zeros((0, 3))) == {}
    assert adaptive_calibration_error(np.zeros(0, int), np.zeros((0, 3))) is None
