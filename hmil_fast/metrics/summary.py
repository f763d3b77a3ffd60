"""All metrics of a set of predictions, as metrics.json holds them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hmil_fast.labels import LabelTree
from hmil_fast.metrics.bootstrap import Interval, bootstrap
from hmil_fast.metrics.calibration import adaptive_calibration_error, calibration_error
from hmil_fast.metrics.flat import (
    Floats,
    Ints,
    checked,
    weighted_class_metrics,
    weighted_flat_metrics,
)
from hmil_fast.metrics.tree import weighted_tree_metrics


def level_name(level: int, num_levels: int) -> str:
    """What a level of the label tree is called in tables and in the report."""
    if level == num_levels - 1:
        return "leaf"
    return "coarse" if num_levels == 2 else f"level {level}"


def evaluate_predictions(
    tree: LabelTree,
    y_leaf: Ints,
    probabilities: Sequence[Floats],
    patients: Sequence[str],
    seed: int = 0,
    draws: int = 1000,
    heads: Sequence[Floats] = (),
) -> dict[str, Any]:
    """Every metric per level, per class and on the tree, with 95 % intervals over patients.

    Args:
        tree: The label tree.
        y_leaf: True leaves, int [n].
        probabilities: Per level, coarse first, float [n, K_l].
        patients: Patient of each slide, [n].
        seed: Seed of the bootstrap.
        draws: Bootstrap draws; 0 gives values without intervals.
        heads: Per level above the leaves what its own head says, if there is one, float [n, K_l].

    Returns:
        ``{"levels": {"0": {metric: cell}}, "tree": {metric: cell}, "classes": {"0": {node:
        {"slides": n, metric: cell}}}, "slides": n, "patients": m}`` with cell ``{"value": v,
        "low": l, "high": h, "undefined": draws left out}``; low and high are None where there is
        no interval. An undefined metric is absent. JSON-able.

    Raises:
        UsageError: A probability is not finite.
        ValueError: Shapes do not fit the tree.
    """
    truths, levels = checked_levels(tree, y_leaf, probabilities, patients)
    result: dict[str, Any] = {
        "levels": {str(level): {} for level in range(tree.num_levels)},
        "tree": {},
        "classes": {
            str(level): {
                name: {"slides": int((truths[level] == k).sum())} for k, name in enumerate(names)
            }
            for level, names in enumerate(tree.names)
        },
        "slides": len(truths[-1]),
        "patients": len(set(patients)),
    }
    if not len(truths[-1]):
        return result

    def everything(weights: Floats) -> dict[str, Floats]:
        values: dict[str, Floats] = {}
        for level, (y, p) in enumerate(zip(truths, levels, strict=True)):
            of_class = weighted_class_metrics(y, p, weights)
            for name, v in weighted_flat_metrics(y, p, weights, of_class).items():
                values[f"{level}/{name}"] = v
            for name, v in of_class.items():
                values |= {f"{level}/{name}/{k}": column for k, column in enumerate(v.T)}
        on_tree = weighted_tree_metrics(tree, truths[-1], levels, weights, heads)
        return values | {f"tree/{name}": v for name, v in on_tree.items()}

    intervals = bootstrap(everything, patients, draws, seed)
    for key, value in everything(np.ones((1, len(truths[-1])))).items():
        where, name, *k = key.split("/")
        if np.isfinite(value[0]):
            place = result["tree"] if where == "tree" else result["levels"][where]
            if k:
                place = result["classes"][where][tree.names[int(where)][int(k[0])]]
            place[name] = cell(float(value[0]), intervals.get(key))
    for level, (y, p) in enumerate(zip(truths, levels, strict=True)):
        for name, error in (
            ("ece", calibration_error),
            ("ece_adaptive", adaptive_calibration_error),
        ):
            result["levels"][str(level)][name] = cell(error(y, p) or 0.0, None)
    return result


def checked_levels(
    tree: LabelTree, y_leaf: Ints, probabilities: Sequence[Floats], patients: Sequence[str]
) -> tuple[list[Ints], list[Floats]]:
    """Per level the true nodes int64 [n] and the probabilities float64 [n, K_l].

    Raises:
        UsageError: A probability is not finite.
        ValueError: Shapes do not fit the tree.
    """
    if len(probabilities) != tree.num_levels or len(patients) != len(y_leaf):
        raise ValueError("one probability array per level and one patient per slide, please")
    nodes = tree.ancestors()
    truths, levels = [], []
    for level, p in enumerate(probabilities):
        if np.asarray(p).shape != (len(y_leaf), tree.num_classes[level]):
            raise ValueError(f"level {level}: probabilities {np.asarray(p).shape} miss the tree")
        y, floats = checked(nodes[level][np.asarray(y_leaf, dtype=np.int64)], p)
        truths.append(y)
        levels.append(floats)
    return truths, levels


def cell(value: float, interval: Interval | None) -> dict[str, float | int | None]:
    """A value with its interval, as metrics.json holds it."""
    low, high, undefined = interval or Interval(None, None, 0)
    return {"value": value, "low": low, "high": high, "undefined": undefined}
