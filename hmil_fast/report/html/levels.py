"""The tables of one level of the tree: its confusion matrix, its nodes."""

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from hmil_fast.report.html.data import ReportData
from hmil_fast.report.html.tables import value_text

Ints = NDArray[np.int64]

_CLASS_METRICS = {
    "auc": "AUC", "recall": "recall", "specificity": "specificity", "precision": "precision",
    "f1": "F1",
}  # fmt: skip


def confusion_table(
    y: Ints, predicted: Ints, names: Sequence[str], level: int, groups: Sequence[int] | None = None
) -> str:
    """Counts of true (rows) against predicted classes, tinted by the share of the row.

    Args:
        y: True classes, int [n].
        predicted: Predicted classes, int [n].
        names: Class names in the order of the tree.
        level: The tree's level; a cell shows the slides it counts by it.
        groups: Parent of each class; a line is drawn where it changes.
    """
    classes = len(names)
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (np.asarray(y), np.asarray(predicted)), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cut = [bool(groups and k and groups[k] != groups[k - 1]) for k in range(classes)]
    left = [' class="cut-left"' if c else "" for c in cut]
    heads = "".join(
        f'<th scope="col"{left[k]}><span>{escape(name)}</span></th>' for k, name in enumerate(names)
    )
    lines = []
    for row, name in enumerate(names):
        cells = []
        for column, other in enumerate(names):
            n, part = counts[row, column], share[row, column]
            text = (
                f'<button type="button" data-level="{level}" data-true="{row}" '
                f'data-said="{column}" title="{escape(name)}, predicted {escape(other)}: '
                f'{part:.0%} of the row">{n}</button>'
                if n
                else ""
            )
            cells.append(f'<td{left[column]} style="--share:{part:.3f}">{text}</td>')
        kind = ' class="cut-top"' if cut[row] else ""
        lines.append(f'<tr{kind}><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    many = " many" if classes > 2 else ""
    return (
        f'<table class="confusion{many}"><thead><tr class="said">'
        f'<th class="axis">true ↓ predicted →</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def classes_table(data: ReportData, level: int) -> str:
    """What is known of every node of a level; empty where metrics.json does not say."""
    nodes = (data.metrics["pooled"].get("classes") or {}).get(str(level)) or {}
    if not any(key in cells for cells in nodes.values() for key in _CLASS_METRICS):
        return ""
    heads = "".join(f'<th scope="col" class="n">{name}</th>' for name in _CLASS_METRICS.values())
    lines = []
    for name in data.tree.names[level]:
        cells = nodes.get(name) or {}
        values = "".join(
            f'<td class="n">{value_text(cells.get(key))}</td>' for key in _CLASS_METRICS
        )
        slides = escape(str(cells.get("slides", "–")))
        lines.append(
            f'<tr><th scope="row">{escape(name)}</th><td class="n">{slides}</td>{values}</tr>'
        )
    return (
        '<div class="wide"><table class="classes"><thead><tr><th scope="col">node</th>'
        f'<th scope="col" class="n">slides</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
