"""Gather the report's view of one level of the tree: curves, confusion matrix, nodes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from hmil_fast.metrics import level_name
from hmil_fast.report.html.charts import reliability_chart, roc_chart
from hmil_fast.report.html.data import ReportData
from hmil_fast.report.html.tables import Metric, metric_of

Ints = NDArray[np.int64]

_CLASS_METRICS = {
    "auc": "AUC", "recall": "recall", "specificity": "specificity", "precision": "precision",
    "f1": "F1",
}  # fmt: skip


class Cell(NamedTuple):
    """A cell of a confusion matrix: its slides and their share of the row."""

    slides: int
    share: float


class Confusion(NamedTuple):
    """A confusion matrix.

    Attributes:
        names: Class names in the order of the tree.
        rows: Per true class the cells of the predicted classes.
        cut: Per class whether its parent differs from that of the class before.
    """

    names: Sequence[str]
    rows: list[list[Cell]]
    cut: list[bool]


class Level(NamedTuple):
    """What the report shows of a level.

    `classes` are the name, slides and metrics of each node, empty where metrics.json lacks them.
    """

    number: int
    heading: str
    roc: Markup
    reliability: Markup
    confusion: Confusion
    class_metrics: list[str]
    classes: list[tuple[str, str, list[Metric | None]]]


def level_of(data: ReportData, level: int) -> Level:
    """ROC, confusion and reliability of a level, over all tested slides."""
    names = data.tree.names[level]
    known = data.truths[level] >= 0
    y, p = data.truths[level][known], data.probabilities[level][known]
    groups: Sequence[int] | None = data.tree.parents[level - 1] if level else None
    name = level_name(level, data.tree.num_levels)
    return Level(
        level,
        f"{name[0].upper()}{name[1:]}: {', '.join(names)}",
        roc_chart(y, p, names, f"ROC curves, {name}"),
        reliability_chart(y, p, f"reliability diagram, {name}"),
        confusion_of(y, data.answers[level][known], names, groups),
        list(_CLASS_METRICS.values()),
        _classes(data, level),
    )


def confusion_of(
    y: Ints, predicted: Ints, names: Sequence[str], groups: Sequence[int] | None = None
) -> Confusion:
    """Count true (rows) against predicted classes.

    Args:
        y: True classes, int [n].
        predicted: Predicted classes, int [n].
        names: Class names in the order of the tree.
        groups: Parent of each class; a line is drawn where it changes.
    """
    classes = len(names)
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (np.asarray(y), np.asarray(predicted)), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows = [
        [Cell(int(n), float(part)) for n, part in zip(*row, strict=True)]
        for row in zip(counts, share, strict=True)
    ]
    cut = [bool(groups and k and groups[k] != groups[k - 1]) for k in range(classes)]
    return Confusion(names, rows, cut)


def _classes(data: ReportData, level: int) -> list[tuple[str, str, list[Metric | None]]]:
    nodes = (data.metrics["pooled"].get("classes") or {}).get(str(level)) or {}
    if not any(key in cells for cells in nodes.values() for key in _CLASS_METRICS):
        return []
    rows = []
    for name in data.tree.names[level]:
        cells = nodes.get(name) or {}
        metrics = [metric_of(cells.get(key)) for key in _CLASS_METRICS]
        rows.append((name, str(cells.get("slides", "–")), metrics))
    return rows
