"""Metrics of one level of the tree, for one sample or many bootstrap draws at once.

Every metric is computed from a weight per slide, so that a bootstrap draw is a row of counts and
1,000 draws are a few matrix products. Undefined values are NaN inside and absent outside.
"""

import numpy as np
from numpy.typing import NDArray

from hmil_fast.errors import UsageError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def flat_metrics(y: Ints, p: Floats, predicted: Ints | None = None) -> dict[str, float]:
    """Metrics of the predictions of one level; a metric the slides leave undefined is absent.

    * ``auc``: one-vs-rest area under the ROC curve, averaged over the classes that have both
      positive and negative slides; ties count half. Absent when no class has both.
    * ``accuracy``; ``balanced_accuracy``: mean recall over the classes that occur in ``y``.
    * ``macro_f1``: mean F1 over the classes that occur in ``y`` or are predicted.
    * ``specificity``: mean true-negative rate over the classes that some slide does not have.
    * ``qwk``: Cohen's kappa with quadratic weights |i − j|² between class indices; it means
      something only where the classes are in order (a grade). Absent when chance alone leaves no
      disagreement (one class, always predicted).
    * ``brier``: mean squared distance from the true class's one-hot vector, 0 to 2; ``nll``: mean
      −log of the true class's probability, cut off at the least float64 as scikit-learn does.

    Args:
        y: True classes, int [n], each in 0..K-1.
        p: Probabilities, float [n, K].
        predicted: The answers, int [n]; by default the likeliest class, of equals the first.

    Returns:
        The defined metrics; empty for n = 0.

    Raises:
        UsageError: A probability is not finite.
        ValueError: Shapes disagree or a class is out of range.
    """
    y, p = checked(y, p)
    if not len(y):
        return {}
    values = weighted_flat_metrics(y, p, np.ones((1, len(y))), predicted=predicted)
    return {name: float(v[0]) for name, v in values.items() if np.isfinite(v[0])}


def weighted_flat_metrics(
    y: Ints,
    p: Floats,
    weights: Floats,
    of_class: dict[str, Floats] | None = None,
    predicted: Ints | None = None,
) -> dict[str, Floats]:
    """`flat_metrics` for every row of weights; NaN where a row leaves a metric undefined.

    Args:
        y: True classes, int [n].
        p: Probabilities, float [n, K].
        weights: How often each slide counts, float [draws, n].
        of_class: The result of `weighted_class_metrics` for the same, if it is known already.
        predicted: The answers, int [n]; by default the likeliest class.

    Returns:
        Per metric float [draws].
    """
    classes = p.shape[1]
    predicted = p.argmax(axis=1) if predicted is None else predicted
    total = weights.sum(axis=1)
    true = weights @ np.eye(classes)[y]
    guessed = weights @ np.eye(classes)[predicted]
    apart = np.square(np.subtract.outer(np.arange(classes), np.arange(classes))).astype(np.float64)
    observed = weights @ apart[y, predicted]
    expected = ((true @ apart) * guessed).sum(axis=1)
    if of_class is None:
        of_class = weighted_class_metrics(y, p, weights, predicted=predicted)
    squared = np.square(p - np.eye(classes)[y]).sum(axis=1)
    surprise = -np.log(np.maximum(p[np.arange(len(y)), y], np.finfo(np.float64).eps))
    return {
        "auc": _defined_mean(of_class["auc"]),
        "accuracy": ratio(weights @ (y == predicted).astype(np.float64), total),
        "balanced_accuracy": _defined_mean(of_class["recall"]),
        "macro_f1": _defined_mean(of_class["f1"]),
        "specificity": _defined_mean(of_class["specificity"]),
        "qwk": 1 - ratio(observed * total, expected),
        "brier": ratio(weights @ squared, total),
        "nll": ratio(weights @ surprise, total),
    }


def weighted_class_metrics(
    y: Ints,
    p: Floats,
    weights: Floats,
    scores: Floats | None = None,
    predicted: Ints | None = None,
) -> dict[str, Floats]:
    """Metrics of every class against the rest, for every row of weights.

    Args:
        y: True classes, int [n].
        p: Probabilities, float [n, K].
        weights: How often each slide counts, float [draws, n].
        scores: What the AUC sorts slides by, float [n, K]; by default the probabilities.
        predicted: The answers, int [n]; by default the likeliest class.

    Returns:
        ``auc``, ``recall`` (sensitivity), ``specificity``, ``precision`` and ``f1``, each float
        [draws, K], NaN where a row leaves it undefined.
    """
    classes = p.shape[1]
    predicted = p.argmax(axis=1) if predicted is None else predicted
    total = weights.sum(axis=1)[:, None]
    is_true = np.eye(classes)[y]
    true = weights @ is_true
    guessed = weights @ np.eye(classes)[predicted]
    both = weights @ (is_true * (y == predicted)[:, None])
    scores = p if scores is None else scores
    return {
        "auc": np.stack([_auc(y == c, scores[:, c], weights) for c in range(classes)], 1),
        "recall": ratio(both, true),
        "specificity": ratio(total - true - guessed + both, total - true),
        "precision": ratio(both, guessed),
        "f1": ratio(2 * both, true + guessed),
    }


def checked(y: Ints, p: Floats) -> tuple[Ints, Floats]:
    """Classes as int64 [n] and probabilities as float64 [n, K], after a look at both."""
    y = np.asarray(y, dtype=np.int64)
    p = np.asarray(p, dtype=np.float64)
    if y.ndim != 1 or p.ndim != 2 or len(y) != len(p) or p.shape[1] < 1:
        raise ValueError(f"classes {y.shape} and probabilities {p.shape} do not belong together")
    if len(y) and not (y.min() >= 0 and y.max() < p.shape[1]):
        raise ValueError(f"classes lie outside 0..{p.shape[1] - 1}")
    bad = int((~np.isfinite(p)).any(axis=1).sum())
    if bad:
        raise UsageError(
            f"the predictions of {bad} of {len(p)} slides are not finite",
            "train again with a lower learning rate, and look for NaN in the features",
        )
    return y, p


def _auc(positive: NDArray[np.bool_], score: Floats, weights: Floats) -> Floats:
    """Weighted Mann-Whitney statistic per row of weights; ties count half."""
    up, down = np.flatnonzero(positive), np.flatnonzero(~positive)
    down = down[np.argsort(score[down], kind="stable")]
    below = np.zeros((len(weights), len(down) + 1))  # negatives up to each in the order of score
    np.cumsum(weights[:, down], axis=1, out=below[:, 1:])
    less = np.searchsorted(score[down], score[up], side="left")
    no_more = np.searchsorted(score[down], score[up], side="right")
    won = below[:, less]
    if (less != no_more).any():
        won = (won + below[:, no_more]) / 2
    raised = weights[:, up]
    return ratio(np.einsum("dn,dn->d", raised, won), raised.sum(axis=1) * below[:, -1])


def ratio(above: Floats, below: Floats) -> Floats:
    """Above / below, NaN where below is 0."""
    result = np.full(np.broadcast_shapes(above.shape, below.shape), np.nan)
    np.divide(above, below, out=result, where=below > 0)
    return result


def _defined_mean(values: Floats) -> Floats:
    """Mean over the last axis of what is not NaN; NaN where nothing is."""
    defined = np.isfinite(values)
    return ratio(np.where(defined, values, 0).sum(axis=-1), defined.sum(axis=-1, dtype=np.float64))
