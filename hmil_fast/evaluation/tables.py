"""Make the rows of the metrics table and of the comparison table."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from hmil_fast.metrics import cell_text, level_name, metric_name, number_text, rates
from hmil_fast.metrics.text import MISSING

_LEVEL_METRICS = ("auc", "balanced_accuracy", "macro_f1")


def metric_rows(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table of metrics.json: a row per metric, a column per model."""
    models = [(metrics["model"], metrics)]
    if "baseline" in metrics:
        models.append((f"{metrics['baseline']['model']} (baseline)", metrics["baseline"]))
    rows: list[list[str]] = []

    def add(heading: str, *path: str, always: bool = False) -> None:
        """A row, if some model has the value."""
        cells = [_value_at(model, path) for _, model in models]
        if always or any(cell is not None for cell in cells):
            rows.append([heading, *map(cell_text, cells)])

    pooled = metrics["pooled"]
    levels = sorted(pooled["levels"], key=int)
    named = [(level, level_name(int(level), len(levels))) for level in levels]
    for level, name in named:
        cells = ("pooled", "levels", level)
        for metric in _LEVEL_METRICS:
            add(f"{name} {metric_name(metric)}", *cells, metric, always=True)
        for heading, *path in rates(pooled, level):
            add(f"{name} {heading}", "pooled", *path)
        if in_order(pooled.get("classes", {}).get(level, ())):
            add(f"{name} {metric_name('qwk')}", *cells, "qwk")
    add(metric_name("hierarchical_f1"), "pooled", "tree", "hierarchical_f1", always=True)
    point = metrics.get("operating")
    for rate in ("sensitivity", "specificity"):
        if point is None:
            break
        heading = f"{point['of']} {rate}, threshold for {point['asked']:g}"
        add(heading, "operating", rate)
    for level, name in named:
        for when, suffix in (("before", ""), ("after", ", temperature set")):
            heading = f"{name} {metric_name('ece')}{suffix}"
            add(heading, "calibration", "levels", level, when, "ece")
    alpha = metrics.get("conformal", {}).get("risk")
    add(f"conformal coverage, alpha {alpha}", "conformal", "node", "coverage")
    add("  mean depth of the nodes", "conformal", "node", "mean_depth")
    add("  leaves in a set (LAC)", "conformal", "lac", "mean_size")
    return ["", *(name for name, _ in models)], rows


def comparison_rows(
    comparison: Mapping[str, Any], num_levels: int
) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table of one comparison of `hmil_fast.evaluation.compare`.

    The rows are the tested metrics; all metrics where nothing could be tested.
    """
    metrics = comparison["metrics"]
    tested = {name: test for name, test in metrics.items() if test["p_holm"] is not None}
    rows = []
    for name, test in (tested or metrics).items():
        place, metric = name.split("/")
        level = "" if place == "tree" else level_name(int(place), num_levels) + " "
        p_values = [MISSING if test[key] is None else f"{test[key]:.4f}" for key in ("p", "p_holm")]
        if test["p_holm"] is not None and test["p_holm"] < 0.05:
            p_values[1] += " *"
        difference = {**test, "value": test["difference"]}
        values = [number_text(test[side]) for side in ("first", "second")]
        rows.append([level + metric_name(metric), *values, cell_text(difference, "+"), *p_values])
    return ["", "A", "B", "B − A [95 %]", "p", "p (Holm)"], rows


def in_order(names: Sequence[str]) -> bool:
    """Whether class names count up, as grades do; only then a quadratic kappa means something."""
    matches = [re.fullmatch(r"\D*(\d+)\D*", name) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    return len(numbers) == len(names) > 2 and all(a < b for a, b in pairwise(numbers))


def _value_at(values: Any, path: Sequence[str]) -> Any:
    """The value of nested mappings along a path of keys; None where a key is missing."""
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values
