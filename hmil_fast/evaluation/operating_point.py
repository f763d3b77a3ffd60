"""Choose a threshold for one class that reaches a sensitivity on held-out slides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import bootstrap
from hmil_fast.metrics.flat import Floats, ratio
from hmil_fast.metrics.summary import cell
from hmil_fast.runs.predictions import Prediction
from hmil_fast.runs.run import Run

_DRAWS = 1000


@dataclass(frozen=True)
class OperatingPoint:
    """The sensitivity that is asked for, in (0, 1), and the node of the tree that it is of."""

    of: str
    sensitivity: float


def threshold_for(scores: Floats, sensitivity: float) -> float:
    """The largest threshold that at least this share of positive slides reaches.

    Args:
        scores: Probability of the class for positive slides, float [n].
        sensitivity: Asked share, in (0, 1).

    Returns:
        The threshold; 0 without slides.
    """
    missed = int(np.floor(len(scores) * (1 - sensitivity) + 1e-9))
    return float(np.sort(scores)[missed]) if len(scores) else 0.0


def at_operating_point(
    run: Run,
    point: OperatingPoint,
    groups: Sequence[tuple[Sequence[Prediction], Sequence[Prediction]]],
) -> dict[str, Any]:
    """Sensitivity and specificity of a class whose threshold was chosen on other slides.

    Args:
        run: The run.
        point: The operating point.
        groups: Pairs of the slides that choose a threshold and the slides that are tested with it:
            one pair a fold, its validation and its test slides.

    Returns:
        ``{"of", "level", "asked", "thresholds": [per group], "positives": [slides that chose each],
        "sensitivity", "specificity", "precision": cell}``.

    Raises:
        UsageError: The tree has no such node.
    """
    level, node = _find(run.tree, point.of)
    thresholds, positives = [], []
    called, sick, patients = [np.zeros(0, bool)], [np.zeros(0, bool)], []
    for choosing, tested in groups:
        scores, truth = _scored(run.tree, choosing, level, node)
        thresholds.append(threshold_for(scores[truth == 1], point.sensitivity))
        positives.append(int((truth == 1).sum()))
        scores, truth = _scored(run.tree, tested, level, node)
        known = truth >= 0
        called.append(scores[known] >= thresholds[-1])
        sick.append(truth[known] == 1)
        patients += [p.patient_id for p, k in zip(tested, known, strict=True) if k]
    yes, ill = np.concatenate(called), np.concatenate(sick)

    def rates(weights: Floats) -> dict[str, Floats]:
        def mass(chosen: NDArray[np.bool_]) -> Floats:
            return np.asarray(weights @ chosen.astype(np.float64))

        return {
            "sensitivity": ratio(mass(yes & ill), mass(ill)),
            "specificity": ratio(mass(~yes & ~ill), mass(~ill)),
            "precision": ratio(mass(yes & ill), mass(yes)),
        }

    intervals = bootstrap(rates, patients, _DRAWS, run.config.seed)
    values = rates(np.ones((1, len(yes))))
    return {
        "of": point.of,
        "level": level,
        "asked": point.sensitivity,
        "thresholds": thresholds,
        "positives": positives,
    } | {
        name: cell(float(value[0]), intervals.get(name))
        for name, value in values.items()
        if np.isfinite(value[0])
    }


def _find(tree: LabelTree, name: str) -> tuple[int, int]:
    for level, names in enumerate(tree.names):
        if name in names:
            return level, names.index(name)
    every = dict.fromkeys(n for names in tree.names for n in names)
    raise UsageError(f"no node of the tree is called {name!r}", f"give --of {', '.join(every)}")


def _scored(
    tree: LabelTree, predictions: Sequence[Prediction], level: int, node: int
) -> tuple[Floats, NDArray[np.int64]]:
    """Probability of a node, and 1 if the label is it, 0 if not, −1 if the label is coarser."""
    scores = np.array([p.probabilities[level][node] for p in predictions], dtype=np.float64)
    true = np.array([tree.path(p.label)[level] for p in predictions], dtype=np.int64)
    return scores, np.where(true < 0, -1, (true == node).astype(np.int64))
