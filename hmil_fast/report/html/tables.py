"""The tables of the report over all levels: headline numbers, folds."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hmil_fast.metrics import level_name, rates
from hmil_fast.report.html.data import ReportData

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
_PER_LEVEL: dict[str, str] = {"head_against_answer": "{} head prefers another node"}
_COLOURS = ("var(--blue)", "var(--orange)")


def count(n: int, noun: str, many: str | None = None) -> str:
    """A number and its noun, "1 slide" or "2 slides"."""
    return f"{n:,} {noun if n == 1 else many or noun + 's'}"


def headline_table(data: ReportData) -> str:
    """Every metric with its interval, the baseline's beside it where there is one."""
    runs = [(str(data.metrics.get("model", "model")), data.metrics["pooled"], _COLOURS[0])]
    baseline = data.metrics.get("baseline")
    if baseline:
        runs.append((str(baseline.get("model", "baseline")), baseline["pooled"], _COLOURS[1]))
    heads = "".join(f'<th scope="col" class="n">{escape(name)}</th>' for name, _, _ in runs)
    lines = []
    for group, names, cells, chance in _groups(data, [pooled for _, pooled, _ in runs]):
        lines.append(f'<tr><th class="group" colspan="{len(runs) + 2}">{escape(group)}</th></tr>')
        for key, (name, scale) in names.items():
            row = [c.get(key) for c in cells]
            if not any(row):
                continue
            values = "".join(f'<td class="n">{value_text(cell)}</td>' for cell in row)
            colours = [colour for _, _, colour in runs]
            bar = _bar(row, colours, scale, chance.get(key)) if scale else ""
            lines.append(f"<tr><td>{escape(name)}</td>{values}<td>{bar}</td></tr>")
    undefined = max(
        (
            cell["undefined"] or 0
            for _, _, cells, _ in _groups(data, [data.metrics["pooled"]])
            for cell in cells[0].values()
            if "undefined" in cell
        ),
        default=0,
    )
    note = (
        "In brackets: 95 % intervals from resampled patients. They show how far the "
        "number would move with other patients, not with another training run. "
        "A tick on a scale from 0 to 1 marks what guessing would score."
    )
    if undefined:
        note += f" Up to {undefined} resamples left a metric undefined and were not counted."
    return (
        f'{_cards(runs)}<p class="note">{note}</p>'
        '<div class="wide"><table id="headline"><thead><tr>'
        f'<th scope="col">metric</th>{heads}<th scope="col">0 to 1</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cards(runs: Sequence[tuple[str, Mapping[str, Any], str]]) -> str:
    """The few numbers to look at first."""
    last = max(runs[0][1]["levels"], key=int, default="0")
    wanted: list[tuple[str, ...]] = []
    for level in dict.fromkeys(("0", last)):
        name = level_name(int(level), int(last) + 1)
        wanted += [
            (f"{name} balanced accuracy", "levels", level, "balanced_accuracy"),
            *((f"{name} {heading}", *path) for heading, *path in rates(runs[0][1], level)),
            (f"{name} AUC", "levels", level, "auc"),
        ]
    wanted.append(("hierarchical F1", "tree", "hierarchical_f1"))
    cards = []
    for name, *path in wanted:
        cells = [_cell(pooled, path) for _, pooled, _ in runs]
        if not cells[0]:
            continue
        _, _, interval = value_text(cells[0]).partition("</b>")
        text = f"<b>{number_text(cells[0]['value'])}</b>{interval}"
        for (model, _, _), cell in zip(runs[1:], cells[1:], strict=True):
            text += f" · {escape(model)} {number_text(cell.get('value'))}"
        cards.append(f"<div><dt>{escape(name)}</dt><dd>{text}</dd></div>")
    return f'<dl class="cards">{"".join(cards)}</dl>' if cards else ""


def folds_table(data: ReportData) -> str:
    """The chief metrics of every fold, their mean and standard deviation."""
    folds: Sequence[Mapping[str, Any]] = data.metrics["folds"]
    columns: list[tuple[str, tuple[str, ...]]] = [
        (
            f"{level_name(level, data.tree.num_levels)}<br>{_LEVEL_METRICS[key][0].split(' (')[0]}",
            ("levels", str(level), key),
        )
        for level in range(data.tree.num_levels)
        for key in ("auc", "balanced_accuracy", "macro_f1")
    ]
    columns.append(("hierarchical<br>F1", ("tree", "hierarchical_f1")))
    heads = "".join(f'<th scope="col" class="n">{name}</th>' for name, _ in columns)
    table = [[_cell(fold, path).get("value") for _, path in columns] for fold in folds]
    lines = [
        f'<tr><td>{number}</td><td class="n">{fold.get("slides", "")}</td>'
        + "".join(f'<td class="n">{number_text(v)}</td>' for v in row)
        + "</tr>"
        for number, (fold, row) in enumerate(zip(folds, table, strict=True))
    ]
    summary = []
    for column in zip(*table, strict=True):
        known = [v for v in column if v is not None]
        mean = sum(known) / len(known) if known else None
        spread = (
            math.sqrt(sum((v - mean) ** 2 for v in known) / (len(known) - 1))
            if mean is not None and len(known) > 1
            else None
        )
        text = number_text(mean) + (
            f" <small>± {number_text(spread)}</small>" if spread is not None else ""
        )
        summary.append(f'<td class="n"><b>{text}</b></td>')
    return (
        '<p class="note">± is the standard deviation over folds; folds share training slides, so '
        "it is no error bar.</p>"
        '<div class="wide"><table id="fold-table"><thead><tr><th scope="col">fold</th>'
        f'<th scope="col" class="n">slides</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody>'
        f'<tfoot><tr><td colspan="2"><b>mean</b></td>{"".join(summary)}</tr></tfoot></table></div>'
    )


Group = tuple[str, dict[str, tuple[str, Range]], list[Mapping[str, Any]], dict[str, float]]


def _groups(data: ReportData, runs: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Of every level and the tree: heading, metrics, per run the cells, what guessing scores."""
    groups: list[Group] = []
    levels = data.tree.num_levels
    for level, classes in enumerate(data.tree.num_classes):
        name = level_name(level, levels)
        heading = f"{name[0].upper()}{name[1:]}: {count(classes, 'node')}"
        cells = [run["levels"].get(str(level), {}) for run in runs]
        chance = {"auc": 0.5, "balanced_accuracy": 1 / classes, "qwk": 0.0}
        groups.append((heading, _LEVEL_METRICS, cells, chance))
    between: dict[str, tuple[str, Range]] = {
        f"{key}_{level}": (text.format(level_name(level, levels)), _UNIT)
        for key, text in _PER_LEVEL.items()
        for level in range(levels - 1)
    }
    groups.append(("On the tree", _TREE_METRICS | between, [run["tree"] for run in runs], {}))
    return groups


def value_text(cell: Mapping[str, Any] | None) -> str:
    """A metric and its interval as HTML."""
    if not cell:
        return "–"
    text = f"<b>{number_text(cell['value'])}</b>"
    if cell.get("low") is not None and cell.get("high") is not None:
        text += f" <small>[{number_text(cell['low'])}, {number_text(cell['high'])}]</small>"
    return text


def _bar(
    cells: Sequence[Mapping[str, Any] | None],
    colours: Sequence[str],
    scale: tuple[float, float],
    chance: float | None,
) -> str:
    """Values as dots and intervals as lines on a scale."""

    def x(value: float) -> float:
        return 5 + 160 * (min(max(value, scale[0]), scale[1]) - scale[0]) / (scale[1] - scale[0])

    height = 10 * len(cells) + 2
    marks = []
    if chance is not None:
        at = x(chance)
        line = f'<line x1="{at:.1f}" x2="{at:.1f}" y1="1" y2="{height}" stroke="var(--guide)"/>'
        marks.append(line)
    for number, (cell, colour) in enumerate(zip(cells, colours, strict=True)):
        if not cell:
            continue
        y = 6 + 10 * number
        if cell.get("low") is not None and cell.get("high") is not None:
            marks.append(
                f'<line x1="{x(cell["low"]):.1f}" x2="{x(cell["high"]):.1f}" y1="{y}" y2="{y}" '
                f'stroke="{colour}" stroke-width="2.5" stroke-opacity=".45"/>'
            )
        marks.append(f'<circle cx="{x(cell["value"]):.1f}" cy="{y}" r="3.6" fill="{colour}"/>')
    return (
        f'<svg width="170" height="{height}" aria-hidden="true"><line x1="5" x2="165" '
        f'y1="{height - 0.5}" y2="{height - 0.5}" stroke="var(--line)"/>{"".join(marks)}</svg>'
    )


def _cell(data: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    """A metric's cell, empty where it is undefined."""
    for key in path:
        data = data.get(key) or {}
    return data


def number_text(value: float | None) -> str:
    """A number as the tables write it."""
    return "–" if value is None else f"{value:.3f}".replace("-", "−")
