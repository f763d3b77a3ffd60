"""The report's table of slides, whose pictures open the viewer."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from hmil_fast.report.html.data import ReportData
from hmil_fast.report.html.tables import count


def slides_table(data: ReportData) -> str:
    """Every tested slide; the head of a column sorts by it, a picture opens the viewer."""
    shown = {slide_id: number for number, slide_id in enumerate(data.views)}
    columns = [
        ("slide", ""), ("patient", ""), ("fold", "n"), ("label", ""), ("prediction", ""),
        ("probability", "n"), ("tiles", "n"),
    ]  # fmt: skip
    if data.sure:
        columns.append(("sure of", ""))
    heads = '<th scope="col">attention</th>' if shown else ""
    heads += "".join(
        f'<th scope="col" class="{kind}"><button type="button">{name}</button></th>'
        for name, kind in columns
    )
    lines = []
    for number, row in enumerate(data.rows):
        leaf = data.answers[-1, number]
        answer = data.tree.leaves[leaf]
        wrong = _wrong(data, number)
        p = [level[number] for level in data.probabilities]
        cells = [
            f'<td class="id">{escape(row.slide_id)}</td>',
            f'<td class="id">{escape(row.patient_id)}</td>',
            f'<td class="n">{data.folds[number]}</td>',
            f"<td>{escape(row.label)}</td>",
            f'<td class="answer">{escape(answer)}</td>',
            f'<td class="n">{p[-1][leaf]:.3f}</td>',
            f'<td class="n">{row.num_tiles}</td>',
        ]
        if data.sure:
            sure = data.sure.get((row.slide_id, row.fold))
            cells.append(f"<td>{escape(sure or '–')}</td>")
        if shown:
            look = _look(data.views.get(row.slide_id), row.slide_id)
            cells.insert(0, f"<td>{look}</td>")
        facts = {
            "row": number,
            "view": shown.get(row.slide_id, ""),
            "slide": row.slide_id,
            "label": row.label,
            "answer": answer,
            "true": ",".join(str(k) for k in data.truths[:, number]),
            "said": ",".join(str(k) for k in data.answers[:, number]),
            "p": json.dumps([[round(float(v), 4) for v in level] for level in p]),
        }
        attributes = "".join(f' data-{k}="{escape(str(v))}"' for k, v in facts.items())
        kind = ' class="wrong"' if wrong else ""
        lines.append(f"<tr{kind}{attributes}>{''.join(cells)}</tr>")
    mistakes = sum(_wrong(data, number) for number in range(len(data.rows)))
    note = f"{count(len(data.rows), 'slide')}, {mistakes or 'none'} of them predicted wrongly (✗)."
    if data.sure:
        note += " Sure of: the deepest node that meets the asked risk, – if none does."
    if shown:
        note += " A picture opens the slide under the attention paid for each node."
    if data.left_out:
        note += f" {count(data.left_out, 'slide')} would make this page too large to open."
    return (
        f'<p class="note">{note}</p><div class="filter">'
        '<input type="search" id="find" placeholder="find" aria-label="find in the table"> '
        '<select id="which" aria-label="which slides"><option value="all">all slides</option>'
        '<option value="wrong">mistakes</option><option value="right">right answers</option>'
        '</select> <button type="button" id="clear" hidden>show all</button>'
        '<p id="shown" role="status"></p></div>'
        f'<div class="wide"><table id="slide-table"><thead><tr>{heads}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _wrong(data: ReportData, number: int) -> bool:
    """Whether the answer differs from the label on a level that the label names."""
    true, answer = data.truths[:, number], data.answers[:, number]
    return bool(((true >= 0) & (true != answer)).any())


def _look(view: Mapping[str, Any] | None, slide_id: str) -> str:
    """The small picture of a slide, which opens its view."""
    if view is None:
        return ""
    return (
        f'<button type="button" class="look" title="look at the slide"><img loading="lazy" '
        f'alt="{escape(slide_id)} under its attention" '
        f'src="data:image/webp;base64,{escape(view["small"])}"></button>'
    )
