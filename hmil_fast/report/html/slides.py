"""Gather the report's table of slides."""

import json
from typing import NamedTuple

from hmil_fast.report.html.data import ReportData


class SlideRow(NamedTuple):
    """A tested slide.

    Attributes:
        slide_id: The slide.
        label: Name of its label.
        answer: Name of the predicted leaf.
        wrong: Whether the prediction differs from the label on a level that the label names.
        true: Per level the true node; −1 below a label that is not a leaf.
        predicted: Per level the predicted node.
        probabilities: Per level those of the nodes, as JSON.
        view: Number of its view, "" without one.
        picture: Its small picture, WebP in base64, "" without a view.
        cells: Class and text of the table's cells.
    """

    slide_id: str
    label: str
    answer: str
    wrong: bool
    true: list[int]
    predicted: list[int]
    probabilities: str
    view: int | str
    picture: str
    cells: list[tuple[str, str]]


class Slides(NamedTuple):
    """The table of slides; `columns` have a name and a class, "n" for numbers."""

    columns: list[tuple[str, str]]
    rows: list[SlideRow]
    mistakes: int
    sure: bool
    views: bool
    left_out: int


def slides_of(data: ReportData) -> Slides:
    """Every tested slide in the order of predictions.csv."""
    columns = [
        ("slide", ""), ("patient", ""), ("fold", "n"), ("label", ""), ("prediction", ""),
        ("probability", "n"), ("tiles", "n"),
    ]  # fmt: skip
    if data.sure:
        columns.append(("sure of", ""))
    numbers = {slide_id: number for number, slide_id in enumerate(data.views)}
    rows = [_row(data, number, numbers) for number in range(len(data.rows))]
    mistakes = sum(row.wrong for row in rows)
    return Slides(columns, rows, mistakes, bool(data.sure), bool(data.views), data.left_out)


def _row(data: ReportData, number: int, numbers: dict[str, int]) -> SlideRow:
    row, leaf = data.rows[number], data.answers[-1, number]
    answer = data.tree.leaves[leaf]
    p = [level[number] for level in data.probabilities]
    true, predicted = data.truths[:, number], data.answers[:, number]
    cells = [
        ("id", row.slide_id), ("id", row.patient_id), ("n", str(row.fold)), ("", row.label),
        ("answer", answer), ("n", f"{p[-1][leaf]:.3f}"), ("n", str(row.num_tiles)),
    ]  # fmt: skip
    if data.sure:
        cells.append(("", data.sure.get((row.slide_id, row.fold)) or "–"))
    return SlideRow(
        slide_id=row.slide_id,
        label=row.label,
        answer=answer,
        wrong=bool(((true >= 0) & (true != predicted)).any()),
        true=true.tolist(),
        predicted=predicted.tolist(),
        probabilities=json.dumps([[round(float(v), 4) for v in level] for level in p]),
        view=numbers.get(row.slide_id, ""),
        picture=data.views[row.slide_id]["small"] if row.slide_id in numbers else "",
        cells=cells,
    )
