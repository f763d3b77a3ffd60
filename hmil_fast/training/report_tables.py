"""The tables of the report: headline numbers, folds, slides."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hmil_fast.training.report_data import Run

_LEVEL_METRICS = {
    "auc": "AUC (macro, one against the rest)",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "accuracy": "accuracy",
    "specificity": "specificity (macro)",
    "qwk": "quadratic weighted kappa",
    "ece": "calibration error (ECE, less is better)",
}
_TREE_METRICS = {
    "hierarchical_f1": "hierarchical F1",
    "hierarchical_precision": "hierarchical precision",
    "hierarchical_recall": "hierarchical recall",
    "mean_tree_distance": "mean tree distance (edges, less is better)",
    "mistake_severity": "tree distance of mistakes (edges, less is better)",
}
_PICTURE_BYTES = 64 * 2**20  # pictures inside one page; a browser must still open it
_FULL, _SMALL = (1600, 1600), (300, 128)


def headline_table(data: Run) -> str:
    """Every metric with its interval, the baseline's beside it where there is one."""
    runs = [(str(data.metrics.get("model", "model")), data.metrics["pooled"], "#0072B2")]
    baseline = data.metrics.get("baseline")
    if baseline:
        runs.append((str(baseline.get("model", "baseline")), baseline["pooled"], "#D55E00"))
    heads = "".join(f'<th scope="col" class="n">{escape(name)}</th>' for name, _, _ in runs)
    lines = []
    for group, names, cells in _groups(data, [pooled for _, pooled, _ in runs]):
        lines.append(f'<tr><th class="group" colspan="{len(runs) + 2}">{escape(group)}</th></tr>')
        for key, name in names.items():
            row = [c.get(key) for c in cells]
            if not any(row):
                continue
            values = "".join(f'<td class="n">{_value(cell)}</td>' for cell in row)
            bar = "" if "edges" in name else _bar(row, [colour for _, _, colour in runs])
            lines.append(f"<tr><td>{escape(name)}</td>{values}<td>{bar}</td></tr>")
    undefined = max(
        (
            cell["undefined"] or 0
            for _, _, cells in _groups(data, [data.metrics["pooled"]])
            for cell in cells[0].values()
            if "undefined" in cell
        ),
        default=0,
    )
    note = (
        "In brackets: 95 % intervals from resampled patients. They show how far the "
        "number would move with other patients, not with another training run."
    )
    if undefined:
        note += f" Up to {undefined} resamples left a metric undefined and were not counted."
    return (
        f'<p class="note">{note}</p><div class="wide"><table id="headline"><thead><tr>'
        f'<th scope="col">metric</th>{heads}<th scope="col">0 to 1</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def folds_table(data: Run) -> str:
    """The chief metrics of every fold, their mean and standard deviation."""
    folds: Sequence[Mapping[str, Any]] = data.metrics["folds"]
    columns: list[tuple[str, tuple[str, ...]]] = [
        (f"level {level}<br>{_LEVEL_METRICS[key].split(' (')[0]}", ("levels", str(level), key))
        for level in range(data.tree.num_levels)
        for key in ("auc", "balanced_accuracy", "macro_f1")
    ]
    columns.append(("hierarchical<br>F1", ("tree", "hierarchical_f1")))
    heads = "".join(f'<th scope="col" class="n">{name}</th>' for name, _ in columns)
    table = [[_dig(fold, path) for _, path in columns] for fold in folds]
    lines = [
        f'<tr><td>{number}</td><td class="n">{fold.get("slides", "")}</td>'
        + "".join(f'<td class="n">{_number(v)}</td>' for v in row)
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
        text = _number(mean) + (
            f" <small>± {_number(spread)}</small>" if spread is not None else ""
        )
        summary.append(f'<td class="n"><b>{text}</b></td>')
    return (
        '<p class="note">± is the standard deviation over folds; folds share training slides, so '
        "it is no error bar.</p>"
        '<div class="wide"><table id="fold-table"><thead><tr><th scope="col">fold</th>'
        f'<th scope="col" class="n">slides</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody>'
        f'<tfoot><tr><td colspan="2"><b>mean</b></td>{"".join(summary)}</tr></tfoot></table></div>'
    )


def slides_table(data: Run) -> str:
    """Every tested slide; the head of a column sorts by it."""
    shown = any(data.heatmaps)
    columns = [
        ("slide", ""), ("patient", ""), ("fold", "n"), ("label", ""), ("prediction", ""),
        ("probability", "n"), ("tiles", "n"),
    ]  # fmt: skip
    heads = "".join(
        f'<th scope="col" class="{kind}"><button type="button">{name}</button></th>'
        for name, kind in columns
    ) + ('<th scope="col">attention</th>' if shown else "")
    lines = []
    room = _PICTURE_BYTES
    for number, row in enumerate(data.rows):
        leaf = data.tree.leaf(row["prediction"])
        wrong = row["label"] != row["prediction"]
        cells = [
            f'<td class="id">{escape(row["slide_id"])}</td>',
            f'<td class="id">{escape(row["patient_id"])}</td>',
            f'<td class="n">{data.folds[number]}</td>',
            f"<td>{escape(row['label'])}</td>",
            f'<td class="answer">{escape(row["prediction"])}</td>',
            f'<td class="n">{data.probabilities[-1][number, leaf]:.3f}</td>',
            f'<td class="n">{escape(row["num_tiles"] or "")}</td>',
        ]
        if shown:
            picture = _picture(data.heatmaps[number], row["slide_id"], room)
            room -= len(picture)
            cells.append(f"<td>{picture}</td>")
        lines.append(f"<tr{' class=wrong' if wrong else ''}>{''.join(cells)}</tr>")
    mistakes = sum(row["label"] != row["prediction"] for row in data.rows)
    note = f"{len(data.rows)} slides, {mistakes} of them predicted wrongly (✗)."
    if shown:
        note += " A heatmap opens larger."
    return (
        f'<p class="note">{note}</p><div class="wide"><table id="slide-table"><thead><tr>{heads}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _groups(
    data: Run, runs: Sequence[Mapping[str, Any]]
) -> list[tuple[str, dict[str, str], list[Mapping[str, Any]]]]:
    """Heading, metric names and per run the cells, of every level and of the tree."""
    groups: list[tuple[str, dict[str, str], list[Mapping[str, Any]]]] = []
    for level in range(data.tree.num_levels):
        where = " (diagnoses)" if level == data.tree.num_levels - 1 else ""
        heading = f"Level {level}{where}, {data.tree.num_classes[level]} classes"
        cells = [run["levels"].get(str(level), {}) for run in runs]
        groups.append((heading, _LEVEL_METRICS, cells))
    agreement = {
        f"agreement_{level}": f"level {level} agrees with the predicted diagnosis"
        for level in range(data.tree.num_levels - 1)
    }
    groups.append(("On the tree", _TREE_METRICS | agreement, [run["tree"] for run in runs]))
    return groups


def _value(cell: Mapping[str, Any] | None) -> str:
    if not cell:
        return "–"
    text = f"<b>{_number(cell['value'])}</b>"
    if cell.get("low") is not None and cell.get("high") is not None:
        text += f" <small>[{_number(cell['low'])}, {_number(cell['high'])}]</small>"
    return text


def _bar(cells: Sequence[Mapping[str, Any] | None], colours: Sequence[str]) -> str:
    """Values as dots and intervals as lines on a scale from 0 to 1."""
    height = 10 * len(cells) + 2
    marks = []
    for number, (cell, colour) in enumerate(zip(cells, colours, strict=True)):
        if not cell:
            continue
        y = 6 + 10 * number
        if cell.get("low") is not None and cell.get("high") is not None:
            low, high = (160 * min(max(float(cell[k]), 0.0), 1.0) + 5 for k in ("low", "high"))
            marks.append(
                f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{colour}" '
                'stroke-width="2.5" stroke-opacity=".45"/>'
            )
        x = 160 * min(max(float(cell["value"]), 0.0), 1.0) + 5
        marks.append(f'<circle cx="{x:.1f}" cy="{y}" r="3.6" fill="{colour}"/>')
    return (
        f'<svg width="170" height="{height}" aria-hidden="true"><line x1="5" x2="165" '
        f'y1="{height - 0.5}" y2="{height - 0.5}" stroke="#dfe3e8"/>{"".join(marks)}</svg>'
    )


def _picture(path: Path | None, slide_id: str, room: int) -> str:
    """A small picture that opens the large one; its file name where the page is full."""
    from PIL import Image

    if path is None:
        return ""
    try:
        with Image.open(path) as file:
            full = file.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return "unreadable"
    full.thumbnail(_FULL, Image.Resampling.LANCZOS)
    small = full.copy()
    small.thumbnail(_SMALL, Image.Resampling.LANCZOS)
    title = escape(slide_id)
    html = (
        f'<button type="button" class="look" data-title="{title}" data-full="{_jpeg(full)}">'
        f'<img alt="attention of {title}" src="{_jpeg(small)}"></button>'
    )
    return html if len(html) <= room else f"heatmaps/{escape(path.name)}"


def _jpeg(picture: Any) -> str:
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _dig(data: Mapping[str, Any], path: Sequence[str]) -> float | None:
    """The value of a metric's cell, or None where it is undefined."""
    for key in path:
        data = data.get(key) or {}
    return data.get("value")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")
