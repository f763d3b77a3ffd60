"""Names of metrics and levels, and numbers with intervals, as tables show them."""

from collections.abc import Mapping
from typing import Any

MISSING = "–"
_NAMES = {
    "auc": "AUC", "macro_f1": "macro F1", "hierarchical_f1": "hierarchical F1",
    "qwk": "quadratic kappa", "brier": "Brier score", "nll": "NLL", "ece": "calibration error",
    "ece_adaptive": "calibration error, bins of equal count",
}  # fmt: skip


def metric_name(metric: str) -> str:
    """The name of a metric of metrics.json, for instance "balanced accuracy"."""
    return _NAMES.get(metric, metric.replace("_", " "))


def level_name(level: int, num_levels: int) -> str:
    """The name of a level of the label tree: "coarse" and "leaf", or "level 0", "level 1", …."""
    if level == num_levels - 1:
        return "leaf"
    return "coarse" if num_levels == 2 else f"level {level}"


def number_text(value: float | None, sign: str = "") -> str:
    """A number with three decimals; `sign` "+" marks positive ones, too."""
    return MISSING if value is None else f"{value:{sign}.3f}".replace("-", "−")


def cell_text(cell: Mapping[str, Any] | float | None, sign: str = "") -> str:
    """A cell of metrics.json with its interval, "0.985 [0.958, 1.000]", or a plain number."""
    if not isinstance(cell, Mapping):
        return number_text(cell, sign)
    text = number_text(cell.get("value"), sign)
    if cell.get("low") is None or cell.get("high") is None:
        return text
    return f"{text} [{number_text(cell['low'], sign)}, {number_text(cell['high'], sign)}]"


def rates(pooled: Mapping[str, Any], level: str) -> list[tuple[str, ...]]:
    """Sensitivity and specificity of a level of two nodes, with the second node as positive.

    Returns:
        Headings, each with the path of its cell in `pooled`; none for a level of more nodes.
    """
    names = list(pooled.get("classes", {}).get(level, ()))
    if len(names) != 2:
        return []
    cells = ("classes", level, names[1])
    return [
        (f"sensitivity ({names[1]})", *cells, "recall"),
        (f"specificity ({names[1]})", *cells, "specificity"),
    ]
