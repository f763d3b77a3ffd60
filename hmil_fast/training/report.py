"""report.html: one file that shows a run, with every picture inside, and fetches nothing."""

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from hmil_fast.training.charts import (
    confusion_chart,
    curves_chart,
    reliability_chart,
    roc_chart,
)
from hmil_fast.training.report_data import Run, read_run
from hmil_fast.training.report_tables import folds_table, headline_table, slides_table


def write_report(run: Path) -> Path:
    """Write RUN/report.html from what the run folder holds.

    Needs tree.json, metrics.json and predictions.csv; config.yaml, splits.json, log.jsonl and
    heatmaps/ add their sections where they exist.

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
    if data.epochs:
        chart = _image(curves_chart(data.epochs), "training curves")
        note = (
            "The training loss weighs its terms anew every epoch, so it may rise while each of "
            "them falls. The epoch is chosen by the AUC of the validation slides."
        )
        body = f'<p class="note">{note}</p><div class="charts">{chart}</div>'
        sections.append(("training", "Training", body))
    sections.append(("slides", "Slides", slides_table(data)))
    if data.config:
        sections.append(("config", "Configuration", f"<pre>{escape(data.config)}</pre>"))
    path = run / "report.html"
    beside = run / "report.html.new"
    beside.write_text(_page(data, sections), encoding="utf-8")
    beside.replace(path)
    return path


def _levels(data: Run) -> str:
    """ROC, confusion and reliability of every level, over all tested slides."""
    note = (
        "All tested slides together; in cross-validation each slide is scored by the fold that "
        "tested it."
    )
    parts = [f'<p class="note">{note}</p>']
    nodes = data.tree.ancestors()
    for level, names in enumerate(data.tree.names):
        y, p = nodes[level][data.y_leaf], data.probabilities[level]
        groups: Sequence[int] | None = data.tree.parents[level - 1] if level else None
        charts = (
            (roc_chart(y, p, names), "ROC curves"),
            (confusion_chart(y, p.argmax(axis=1), names, groups), "confusion matrix"),
            (reliability_chart(y, p), "reliability diagram"),
        )
        heading = f"Level {level}: {', '.join(names)}"
        parts.append(f"<h3>{escape(heading)}</h3>")
        images = "".join(_image(svg, f"{what}, level {level}") for svg, what in charts)
        parts.append(f'<div class="charts">{images}</div>')
    return "".join(parts)


def _image(svg: str, text: str) -> str:
    """An SVG as picture: what it holds cannot become part of the page."""
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{escape(text)}" src="data:image/svg+xml;base64,{data}">'


def _page(data: Run, sections: Sequence[tuple[str, str, str]]) -> str:
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    pooled: dict[str, Any] = data.metrics["pooled"]
    facts = [
        str(data.metrics.get("model", "model")),
        f"{pooled['slides']} slides",
        f"{pooled['patients']} patients",
        f"{np.unique(data.folds).size} folds" if np.unique(data.folds).size > 1 else "one split",
        f"{len(data.tree.leaves)} diagnoses on {data.tree.num_levels} levels",
    ]
    fields = {
        # the page's policy lets only this script run, should a name ever slip through unescaped
        "script_sha256": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "title": escape(f"hmil-fast: {data.name}"),
        "subtitle": f"<p>{escape(' · '.join(facts))}</p>",
        "links": "".join(f'<a href="#{a}">{heading}</a>' for a, heading, _ in sections),
        "sections": "".join(
            f'<section id="{a}"><h2>{heading}</h2>{html}</section>\n'
            for a, heading, html in sections
        ),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)
