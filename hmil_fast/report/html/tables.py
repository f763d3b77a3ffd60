"""Gather the report's tables over all levels: headline numbers, folds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hmil_fast.metrics import level_name, number_text, rates
from hmil_fast.report.html.data import ReportData

Cell = Mapping[str, Any]  # of metrics.json: value, low, high, undefined
Range = tuple[float, float] | None
_UNIT = (0.0, 1.0)
_LEVEL_METRICS: dict[str, tuple[str, Range]] = {
    "auc": ("AUC (macro, one against the rest)", _UNIT),
    "balanced_accuracy": ("balanced accuracy", _UNIT),
    "macro_f1": ("macro F1", _UNIT),
    "accuracy": ("accuracy", _UNIT),
    "specificity": ("specificity (macro)", _UNIT),
    "qwk": ("quadratic weighted kappa (scale −1 to 1)", (-1.0, 1.0)),
    "ece": ("calibration error (ECE, less is better)", _UNIT),
    "ece_adaptive": ("calibration error in bins of equal count (less is better)", _UNIT),
    "brier": ("Brier score (less is better)", None),
    "nll": ("negative log-likelihood (less is better)", None),
}
_TREE_METRICS: dict[str, tuple[str, Range]] = {
    "hierarchical_f1": ("hierarchical F1", _UNIT),
    "hierarchical_precision": ("hierarchical precision", _UNIT),
    "hierarchical_recall": ("hierarchical recall", _UNIT),
    "mean_tree_distance": ("mean tree distance (edges, less is better)", None),
    "mistake_severity": ("tree distance of mistakes (edges, less is better)", None),
}
_COLOURS = ("var(--blue)", "var(--orange)")


class Metric(NamedTuple):
    """A metric as text, with its interval "[low, high]" or ""."""

    text: str
    interval: str


class Mark(NamedTuple):
    """A run's value on a bar, in px: a dot at (x, y) and a line over the interval."""

    x: float
    y: int
    interval: tuple[float, float] | None
    colour: str


class Bar(NamedTuple):
    """The values of all runs on a scale; `chance` is where guessing lies, in px."""

    height: int
    chance: float | None
    marks: list[Mark]


class Row(NamedTuple):
    """A metric of every run."""

    name: str
    metrics: list[Metric | None]
    bar: Bar | None


class Card(NamedTuple):
    """A number to look at first; `others` are further runs, each with its number."""

    name: str
    metric: Metric
    others: list[tuple[str, str]]


class Results(NamedTuple):
    """The first section; `groups` are the headings and metrics of the levels and the tree.

    `undefined` is the most resamples that left a metric undefined.
    """

    models: list[str]
    cards: list[Card]
    groups: list[tuple[str, list[Row]]]
    undefined: int


class Folds(NamedTuple):
    """The table of folds.

    Columns are level and metric, rows the slides and numbers of a fold, means a mean and its
    standard deviation.
    """

    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[str]]]
    means: list[tuple[str, str]]


def counted(n: int, noun: str, many: str | None = None) -> str:
    """A number and its noun, "1 slide" or "2 slides"."""
    return f"{n:,} {noun if n == 1 else many or noun + 's'}"


def metric_of(cell: Cell | None) -> Metric | None:
    """A cell of metrics.json; None where it is missing or empty."""
    if not cell:
        return None
    low, high = cell.get("low"), cell.get("high")
    both = low is not None and high is not None
    interval = f"[{number_text(low)}, {number_text(high)}]" if both else ""
    return Metric(number_text(cell["value"]), interval)


def results_of(data: ReportData) -> Results:
    """Every metric with its interval, the baseline's beside it where there is one."""
    baseline = data.metrics.get("baseline")
    runs = [(str(data.metrics.get("model", "model")), data.metrics["pooled"])]
    if baseline:
        runs.append((str(baseline.get("model", "baseline")), baseline["pooled"]))
    pooled = [run for _, run in runs]
    groups = []
    levels = data.tree.num_levels
    for level, classes in enumerate(data.tree.num_classes):
        name = level_name(level, levels)
        heading = f"{name[0].upper()}{name[1:]}: {counted(classes, 'node')}"
        cells = [run["levels"].get(str(level), {}) for run in pooled]
        chance = {"auc": 0.5, "balanced_accuracy": 1 / classes, "qwk": 0.0}
        groups.append((heading, _rows(_LEVEL_METRICS, cells, chance)))
    between: dict[str, tuple[str, Range]] = {
        f"head_against_answer_{level}": (
            f"{level_name(level, levels)} head prefers another node",
            _UNIT,
        )
        for level in range(levels - 1)
    }
    of_tree = _rows(_TREE_METRICS | between, [run["tree"] for run in pooled], {})
    groups.append(("On the tree", of_tree))
    of_levels = [pooled[0]["levels"].get(str(level), {}) for level in range(levels)]
    undefined = max(
        (
            cell.get("undefined") or 0
            for cells in (*of_levels, pooled[0]["tree"])
            for cell in cells.values()
        ),
        default=0,
    )
    return Results([model for model, _ in runs], _cards(runs), groups, undefined)


def _rows(
    metrics: Mapping[str, tuple[str, Range]],
    runs: Sequence[Mapping[str, Any]],
    chance: Mapping[str, float],
) -> list[Row]:
    """The metrics that any of the runs has."""
    rows = []
    for key, (name, scale) in metrics.items():
        cells = [run.get(key) for run in runs]
        if any(cells):
            bar = _bar(cells, scale, chance.get(key)) if scale else None
            rows.append(Row(name, [metric_of(cell) for cell in cells], bar))
    return rows


def _cards(runs: Sequence[tuple[str, Cell]]) -> list[Card]:
    """The few numbers to look at first."""
    pooled = runs[0][1]
    last = max(pooled["levels"], key=int, default="0")
    wanted: list[tuple[str, ...]] = []
    for level in dict.fromkeys(("0", last)):
        name = level_name(int(level), int(last) + 1)
        wanted += [
            (f"{name} balanced accuracy", "levels", level, "balanced_accuracy"),
            *((f"{name} {heading}", *path) for heading, *path in rates(pooled, level)),
            (f"{name} AUC", "levels", level, "auc"),
        ]
    wanted.append(("hierarchical F1", "tree", "hierarchical_f1"))
    cards = []
    for name, *path in wanted:
        metric = metric_of(_cell(pooled, path))
        if metric:
            others = [(model, number_text(_cell(p, path).get("value"))) for model, p in runs[1:]]
            cards.append(Card(name, metric, others))
    return cards


def folds_of(data: ReportData) -> Folds:
    """The chief metrics of every fold, their mean and standard deviation."""
    folds: Sequence[Cell] = data.metrics["folds"]
    columns = {
        ("levels", str(level), key): (
            level_name(level, data.tree.num_levels),
            _LEVEL_METRICS[key][0].split(" (")[0],
        )
        for level in range(data.tree.num_levels)
        for key in ("auc", "balanced_accuracy", "macro_f1")
    }
    paths = [*columns, ("tree", "hierarchical_f1")]
    table = [[_cell(fold, path).get("value") for path in paths] for fold in folds]
    return Folds(
        [*columns.values(), ("hierarchical", "F1")],
        [
            (str(fold.get("slides", "")), [number_text(value) for value in values])
            for fold, values in zip(folds, table, strict=True)
        ],
        [_mean(column) for column in zip(*table, strict=True)],
    )


def _mean(values: Sequence[float | None]) -> tuple[str, str]:
    """Mean and standard deviation of the values that are known, "" for that of one."""
    known = [v for v in values if v is not None]
    mean = sum(known) / len(known) if known else None
    if mean is None or len(known) < 2:
        return number_text(mean), ""
    variance = sum((v - mean) ** 2 for v in known) / (len(known) - 1)
    return number_text(mean), number_text(math.sqrt(variance))


def _bar(cells: Sequence[Cell | None], scale: tuple[float, float], chance: float | None) -> Bar:
    def x(value: float) -> float:
        return 5 + 160 * (min(max(value, scale[0]), scale[1]) - scale[0]) / (scale[1] - scale[0])

    marks = []
    for number, cell in enumerate(cells):
        if cell:
            low, high = cell.get("low"), cell.get("high")
            interval = None if low is None or high is None else (x(low), x(high))
            marks.append(Mark(x(cell["value"]), 6 + 10 * number, interval, _COLOURS[number]))
    return Bar(10 * len(cells) + 2, None if chance is None else x(chance), marks)


def _cell(data: Cell, path: Sequence[str]) -> Cell:
    """A metric's cell, empty where it is undefined."""
    for key in path:
        data = data.get(key) or {}
    return data
