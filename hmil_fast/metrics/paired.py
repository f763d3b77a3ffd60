"""Paired test of two models on the same slides, resampling patients."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hmil_fast.labels import LabelTree
from hmil_fast.metrics.bootstrap import bootstrap
from hmil_fast.metrics.decision import decide
from hmil_fast.metrics.flat import (
    Floats,
    Ints,
    weighted_class_metrics,
    weighted_flat_metrics,
)
from hmil_fast.metrics.summary import checked_levels
from hmil_fast.metrics.tree import weighted_tree_metrics

_BLOCK = 2_000_000  # weights held at once


class Paired(NamedTuple):
    """A metric of two models: `difference` is second − first, `p` two-sided.

    `low`, `high` and `p` are None where nothing could be drawn.
    """

    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    p: float | None


def paired_comparison(
    tree: LabelTree,
    y_leaf: Ints,
    models: tuple[Floats, Floats],
    patients: Sequence[str],
    seed: int = 0,
    draws: int = 2000,
) -> dict[str, Paired]:
    """Every metric of two models on the same slides, with interval and p value of the difference.

    The interval is the percentile interval of the paired bootstrap: both models are evaluated on
    the same draw of patients. The p value is that of a permutation test: if the models were alike,
    swapping their answers for all slides of a patient would change nothing but by chance. It holds
    for any metric, and for a mean over slides such as accuracy it is a sign-flip test. For the AUC
    it is ranks within a model that are swapped (Bandos et al. 2005): a model that is surer or
    leans to one class has the same AUC, and its scores among those of another would hide which
    of the two sorts better.

    Args:
        tree: The label tree.
        y_leaf: True leaves, int [n].
        models: Per model its leaf probabilities, float [n, leaves].
        patients: Patient of each slide, [n].
        seed: Seed of the draws.
        draws: Bootstrap draws, and as many permutations.

    Returns:
        Per ``<level>/<metric>`` and ``tree/<metric>`` that both models define.

    Raises:
        UsageError: A probability is not finite.
        ValueError: Shapes do not fit the tree.
    """
    from scipy.stats import rankdata

    n = len(y_leaf)
    if not n:
        return {}
    both = [checked_levels(tree, y_leaf, model, patients) for model in models]
    truths = [np.concatenate(pair) for pair in zip(both[0][0], both[1][0], strict=True)]
    levels = [np.concatenate(pair) for pair in zip(both[0][1], both[1][1], strict=True)]
    ranks = [
        np.concatenate([rankdata(p, axis=0) for p in pair])
        for pair in zip(both[0][1], both[1][1], strict=True)
    ]

    answers = [decide(tree, model[1][-1]).nodes for model in both]
    mixed_answers = np.concatenate(answers, axis=1)

    def of_one(which: int, weights: Floats) -> dict[str, Floats]:
        truths, levels = both[which]
        return _measured(tree, truths, levels, (levels, answers[which]), weights)

    def mixed(first: Floats, second: Floats) -> dict[str, Floats]:
        """Metrics of a model whose answers are the first's or the second's, as weighted."""
        weights = np.hstack([first, second])
        return _measured(tree, truths, levels, (ranks, mixed_answers), weights)

    def difference(weights: Floats) -> dict[str, Floats]:
        one, two = of_one(0, weights), of_one(1, weights)
        return {name: two[name] - one[name] for name in one}

    intervals = bootstrap(difference, patients, draws, seed)
    one = np.ones((1, n))
    first, second = of_one(0, one), of_one(1, one)
    defined = [k for k in first if np.isfinite(first[k][0]) and np.isfinite(second[k][0])]
    more = {name: np.zeros(2) for name in defined}  # as large a difference by chance, and draws
    _, patient = np.unique(np.asarray(patients, dtype=np.str_), return_inverse=True)
    count = int(patient.max()) + 1
    rng = np.random.default_rng([seed, 1])
    block = max(1, _BLOCK // n)
    for start in range(0, draws if count > 1 else 0, block):
        swaps = rng.integers(0, 2, (min(block, draws - start), count))[:, patient]
        swapped = swaps.astype(np.float64)
        a, b = mixed(1 - swapped, swapped), mixed(swapped, 1 - swapped)
        for name in defined:
            chance = np.abs(b[name] - a[name])
            seen = abs(second[name][0] - first[name][0]) - 1e-12
            more[name] += (chance >= seen).sum(), np.isfinite(chance).sum()
    result = {}
    for name in defined:
        a_value, b_value = float(first[name][0]), float(second[name][0])
        interval = intervals.get(name)
        above, drawn = more[name]
        result[name] = Paired(
            a_value,
            b_value,
            b_value - a_value,
            interval.low if interval else None,
            interval.high if interval else None,
            float((above + 1) / (drawn + 1)) if drawn else None,
        )
    return result


def _measured(
    tree: LabelTree,
    truths: Sequence[Ints],
    levels: Sequence[Floats],
    judged: tuple[Sequence[Floats], Ints],
    weights: Floats,
) -> dict[str, Floats]:
    """Every metric for every row of weights; `judged` are scores that sort slides, and answers."""
    scores, answers = judged
    values = {}
    for level, (y, p, s, answer) in enumerate(zip(truths, levels, scores, answers, strict=True)):
        of_class = weighted_class_metrics(y, p, weights, s, answer)
        for name, v in weighted_flat_metrics(y, p, weights, of_class, answer).items():
            values[f"{level}/{name}"] = v
    on_tree = weighted_tree_metrics(tree, truths[-1], answers, weights)
    return values | {f"tree/{name}": v for name, v in on_tree.items()}


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """P values corrected for their number (Holm 1979): the family-wise error stays as asked."""
    corrected, least = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda key: p[key])):
        least = max(least, min(1.0, p[name] * (len(p) - rank)))
        corrected[name] = least
    return corrected
