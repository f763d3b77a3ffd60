"""Compute all metrics of a set of predictions, as metrics.json holds them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hmil_fast.labels import LabelTree
from hmil_fast.metrics.bootstrap import Interval, bootstrap
from hmil_fast.metrics.calibration import adaptive_calibration_error, calibration_error
from hmil_fast.metrics.decision import all_levels, decide
from hmil_fast.metrics.flat import (
    Floats,
    Ints,
    checked,
    weighted_class_metrics,
    weighted_flat_metrics,
)
from hmil_fast.metrics.tree import weighted_tree_metrics


def evaluate_predictions(
    tree: LabelTree,
    y: Ints,
    p_leaf: Floats,
    patients: Sequence[str],
    seed: int = 0,
    draws: int = 1000,
    heads: Sequence[Floats] = (),
) -> dict[str, Any]:
    """Every metric per level, per class and on the tree, with 95 % intervals over patients.

    Args:
        tree: The label tree.
        y: True leaves, int [n], or true nodes per level, int [L, n], −1 where a label names none.
        p_leaf: Leaf probabilities, float [n, leaves]; the answers are those of `decide`.
        patients: Patient of each slide, [n].
        seed: Seed of the bootstrap.
        draws: Bootstrap draws; 0 gives values without intervals.
        heads: Softmax of the heads above the leaves, coarse first, float [n, K_l] each.

    Returns:
        ``{"levels": {"0": {metric: cell}}, "tree": {metric: cell}, "classes": {"0": {node:
        {"slides": n, metric: cell}}}, "confusion": {"0": counts of true × answered nodes},
        "slides": n, "patients": m}`` with cell ``{"value": v, "low": l, "high": h, "undefined":
        draws left out}``; low and high are None where there is no interval. An undefined metric is
        absent. A slide counts on the levels that its label names. JSON-able.

    Raises:
        UsageError: A probability is not finite.
        ValueError: Shapes do not fit the tree.
    """
    truths, levels = checked_levels(tree, y, p_leaf, patients)
    answers = decide(tree, levels[-1]).nodes
    known = [truth >= 0 for truth in truths]
    result: dict[str, Any] = {
        "levels": {str(level): {} for level in range(tree.num_levels)},
        "tree": {},
        "classes": {
            str(level): {
                name: {"slides": int((truths[level] == k).sum())} for k, name in enumerate(names)
            }
            for level, names in enumerate(tree.names)
        },
        "confusion": {
            str(level): confusion(truths[level], answers[level], len(names))
            for level, names in enumerate(tree.names)
        },
        "slides": len(patients),
        "patients": len(set(patients)),
    }
    if not len(patients):
        return result

    def everything(weights: Floats) -> dict[str, Floats]:
        values: dict[str, Floats] = {}
        for level in range(tree.num_levels):
            here = known[level]
            if not here.any():
                continue
            true, p, w = truths[level][here], levels[level][here], weights[:, here]
            answered = answers[level][here]
            of_class = weighted_class_metrics(true, p, w, predicted=answered)
            for name, v in weighted_flat_metrics(true, p, w, of_class, answered).items():
                values[f"{level}/{name}"] = v
            for name, v in of_class.items():
                values |= {f"{level}/{name}/{k}": column for k, column in enumerate(v.T)}
        leaf = known[-1]
        on_tree = weighted_tree_metrics(
            tree, truths[-1][leaf], answers[:, leaf], weights[:, leaf], [h[leaf] for h in heads]
        )
        return values | {f"tree/{name}": v for name, v in on_tree.items()}

    intervals = bootstrap(everything, patients, draws, seed)
    for key, value in everything(np.ones((1, len(patients)))).items():
        where, name, *k = key.split("/")
        if np.isfinite(value[0]):
            place = result["tree"] if where == "tree" else result["levels"][where]
            if k:
                place = result["classes"][where][tree.names[int(where)][int(k[0])]]
            place[name] = cell(float(value[0]), intervals.get(key))
    for level, (truth, p, here) in enumerate(zip(truths, levels, known, strict=True)):
        for name, error in (
            ("ece", calibration_error),
            ("ece_adaptive", adaptive_calibration_error),
        ):
            value_here = error(truth[here], p[here])
            if value_here is not None:
                result["levels"][str(level)][name] = cell(value_here, None)
    return result


def confusion(y: Ints, answers: Ints, classes: int) -> list[list[int]]:
    """Counts of true (rows) against answered nodes; true nodes of −1 do not count."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (y[y >= 0], answers[y >= 0]), 1)
    return [[int(n) for n in row] for row in counts]


def checked_levels(
    tree: LabelTree, y: Ints, p_leaf: Floats, patients: Sequence[str]
) -> tuple[list[Ints], list[Floats]]:
    """Per level the true nodes int64 [n], −1 where unknown, and the probabilities float64 [n, K_l].

    Raises:
        UsageError: A probability is not finite.
        ValueError: Shapes do not fit the tree.
    """
    y = np.asarray(y, dtype=np.int64)
    truths = y if y.ndim == 2 else tree.ancestors()[:, y]
    if truths.shape != (tree.num_levels, len(patients)):
        raise ValueError(f"true nodes {truths.shape} do not fit the tree and the slides")
    if np.asarray(p_leaf).shape != (len(patients), len(tree.leaves)):
        raise ValueError(f"leaf probabilities {np.asarray(p_leaf).shape} do not fit the tree")
    p_leaf = checked(np.zeros(len(patients), dtype=np.int64), p_leaf)[1]
    return list(truths), all_levels(tree, p_leaf)


def cell(value: float, interval: Interval | None) -> dict[str, float | int | None]:
    """A value with its interval, as metrics.json holds it."""
    low, high, undefined = interval or Interval(None, None, 0)
    return {"value": value, "low": low, "high": high, "undefined": undefined}
