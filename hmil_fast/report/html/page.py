"""Write report.html: one file that shows a run, holds every picture and fetches nothing."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from hmil_fast.files import write_text
from hmil_fast.labels import LabelTree
from hmil_fast.report.colour_scale import KEYS, heat_colours
from hmil_fast.report.html.charts import curves_chart
from hmil_fast.report.html.data import ReportData, read_run
from hmil_fast.report.html.levels import level_of
from hmil_fast.report.html.slides import slides_of
from hmil_fast.report.html.tables import counted, folds_of, results_of
from hmil_fast.report.html.templates import fill
from hmil_fast.report.html.trust import trust_of

_SCRIPT = ("table.js", "viewer.js", "stage.js")  # one script, in this order


def write_report(run: Path) -> Path:
    """Write RUN/report.html from the files of the run folder.

    Needs tree.json, metrics.json and predictions.csv; config.yaml, splits.json, log.jsonl and
    views/ add their sections where they exist.

    Args:
        run: The run folder.

    Returns:
        The path of the report.

    Raises:
        UsageError: One of the needed files is missing or damaged.
    """
    page = report_page(read_run(run))
    path = run / "report.html"
    write_text(path, page)
    return path


def report_page(data: ReportData) -> str:
    """The text of report.html."""
    folder = Path(__file__).parent
    script = "".join((folder / name).read_text(encoding="utf-8") for name in _SCRIPT)
    several_folds = len(data.metrics.get("folds") or []) > 1
    trust = trust_of(data)
    sections = {
        "results": "Results",
        "folds": several_folds and "Folds",
        "levels": "Levels",
        "trust": trust and "Trust",
        "slides": "Slides",
        "training": data.epochs and "Training",
        "config": data.config and "Configuration",
    }
    return fill(
        "page.html",
        title=data.name,
        facts=_facts(data),
        sections=[(name, heading) for name, heading in sections.items() if heading],
        results=results_of(data),
        folds=folds_of(data) if several_folds else None,
        levels=[level_of(data, level) for level in range(data.tree.num_levels)],
        trust=trust,
        slides=slides_of(data),
        curves=curves_chart(data.epochs) if data.epochs else None,
        config=data.config,
        tree={
            "names": data.tree.names,
            "nodes": _nodes(data.tree),
            "keys": KEYS,
            "colours": base64.b64encode(heat_colours().tobytes()).decode(),
        },
        views=list(data.views.values()),
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),  # noqa: S704
        script=Markup(script),  # noqa: S704
        # the page's policy lets only this script run, should a name ever slip through unescaped
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _facts(data: ReportData) -> list[str]:
    """The model and the sizes of the cohort and its tree."""
    pooled: dict[str, Any] = data.metrics["pooled"]
    folds = np.unique(data.folds).size
    return [
        str(data.metrics.get("model", "model")),
        counted(pooled["slides"], "slide"),
        counted(pooled["patients"], "patient"),
        f"{folds} folds" if folds > 1 else "one split",
        counted(len(data.tree.leaves), "leaf", "leaves"),
        counted(data.tree.num_levels, "level"),
    ]


def _nodes(tree: LabelTree) -> list[dict[str, Any]]:
    """The rows of the viewer's tree, each with the number of nodes above it."""
    rows = []
    up = tree.ancestors()
    for level, node in tree.nodes:
        leaf = int(np.flatnonzero(up[level] == node)[0])
        above = {tree.node(l, int(k)) for l, k in enumerate(up[: level + 1, leaf])}
        title, deep = tree.title(level, node), len(above) - 1
        rows.append({"level": level, "node": node, "title": title, "deep": deep})
    return rows
