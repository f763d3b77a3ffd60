"""report.html: one file that shows a run, with every picture inside, and fetches nothing."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from hmil_fast.labels import LabelTree
from hmil_fast.metrics import level_name
from hmil_fast.report.colour_scale import KEYS, heat_colours
from hmil_fast.report.html.charts import curves_chart, reliability_chart, roc_chart
from hmil_fast.report.html.data import ReportData, read_run
from hmil_fast.report.html.levels import classes_table, confusion_table
from hmil_fast.report.html.slides import slides_table
from hmil_fast.report.html.tables import (
    count,
    folds_table,
    headline_table,
)
from hmil_fast.report.html.trust import trust_section


def write_report(run: Path) -> Path:
    """Write RUN/report.html from what the run folder holds.

    Needs tree.json, metrics.json and predictions.csv; config.yaml, splits.json, log.jsonl and
    views/ add their sections where they exist.

    Args:
        run: The run folder.

    Returns:
        The path of the report.

    Raises:
        UsageError: One of the needed files is missing or damaged.
    """
    data = read_run(run)
    sections = [("results", "Results", headline_table(data))]
    if len(data.metrics.get("folds") or []) > 1:
        sections.append(("folds", "Folds", folds_table(data)))
    sections += [("levels", "Levels", _levels(data))]
    trust = trust_section(data)
    if trust:
        sections.append(("trust", "Trust", trust))
    sections.append(("slides", "Slides", slides_table(data)))
    if data.epochs:
        chart = _figure(curves_chart(data.epochs), "training curves")
        note = (
            "The training loss weighs its terms anew every epoch, so it may rise while each of "
            "them falls. The epoch is chosen by the leaves' balanced accuracy on the validation "
            "slides, of equals by the loss there."
        )
        body = f'<p class="note">{note}</p><div class="charts">{chart}</div>'
        sections.append(("training", "Training", body))
    if data.config:
        sections.append(("config", "Configuration", f"<pre>{escape(data.config)}</pre>"))
    path = run / "report.html"
    beside = run / "report.html.new"
    beside.write_text(_page(data, sections), encoding="utf-8")
    beside.replace(path)
    return path


def _levels(data: ReportData) -> str:
    """ROC, confusion and reliability of every level, over all tested slides."""
    note = (
        "All tested slides together; in cross-validation each slide is scored by the fold that "
        "tested it. A cell of a confusion matrix lists its slides."
    )
    parts = [f'<p class="note">{note}</p>']
    for level, names in enumerate(data.tree.names):
        known = data.truths[level] >= 0
        y, p = data.truths[level][known], data.probabilities[level][known]
        groups: Sequence[int] | None = data.tree.parents[level - 1] if level else None
        name = level_name(level, data.tree.num_levels)
        confusion = confusion_table(y, data.answers[level][known], names, level, groups)
        parts.append(
            f"<h3>{name[0].upper()}{name[1:]}: {escape(', '.join(names))}</h3>"
            f'<div class="level">{_figure(roc_chart(y, p, names), f"ROC curves, {name}")}'
            f"<figure><figcaption>Confusion (slides, by the tree)</figcaption>{confusion}</figure>"
            f"{_figure(reliability_chart(y, p), f'reliability diagram, {name}')}</div>"
            f"{classes_table(data, level)}"
        )
    return "".join(parts)


def _figure(svg: str, text: str) -> str:
    """A chart as part of the page, so that it is drawn in the page's colours and letters."""
    label = f'<svg role="img" aria-label="{escape(text)}" '
    return f"<figure>{svg.replace('<svg', label, 1)}</figure>"


def _json(name: str, value: object) -> str:
    """Data for the page's script; no text in them can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def _data(data: ReportData) -> str:
    """The tree and the slides' views; the views that find no room are left out."""
    tree = {
        "names": data.tree.names,
        "nodes": _nodes(data.tree),
        "keys": KEYS,
        "colours": base64.b64encode(heat_colours().tobytes()).decode(),
    }
    views = "".join(_json(f"view-{n}", view) for n, view in enumerate(data.views.values()))
    return _json("tree", tree) + views


def _nodes(tree: LabelTree) -> list[dict[str, Any]]:
    """The rows of the viewer's tree, each with the number of nodes above it."""
    found = []
    up = tree.ancestors()
    for level, node in tree.nodes:
        leaf = int(np.flatnonzero(up[level] == node)[0])
        above = {tree.node(l, int(k)) for l, k in enumerate(up[: level + 1, leaf])}
        title, deep = tree.title(level, node), len(above) - 1
        found.append({"level": level, "node": node, "title": title, "deep": deep})
    return found


def _page(data: ReportData, sections: Sequence[tuple[str, str, str]]) -> str:
    template, style, script = (
        Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8")
        for kind in ("html", "css", "js")
    )
    # the browser hashes what lies between the tags
    executed = re.split("</?script>", template)[1].replace("{{script}}", script)
    pooled: dict[str, Any] = data.metrics["pooled"]
    facts = [
        str(data.metrics.get("model", "model")),
        count(pooled["slides"], "slide"),
        count(pooled["patients"], "patient"),
        f"{np.unique(data.folds).size} folds" if np.unique(data.folds).size > 1 else "one split",
        count(len(data.tree.leaves), "leaf", "leaves"),
        count(data.tree.num_levels, "level"),
    ]
    fields = {
        # the page's policy lets only this script run, should a name ever slip through unescaped
        "script_sha256": base64.b64encode(hashlib.sha256(executed.encode()).digest()).decode(),
        "style": style,
        "script": script,
        "title": escape(f"hmil-fast: {data.name}"),
        "subtitle": f"<p>{escape(' · '.join(facts))}</p>",
        "links": "".join(f'<a href="#{a}">{heading}</a>' for a, heading, _ in sections),
        "sections": "".join(
            f'<section id="{a}"><h2>{heading}</h2>{html}</section>\n'
            for a, heading, html in sections
        )
        + _data(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)
