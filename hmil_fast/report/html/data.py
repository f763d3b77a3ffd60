"""Read and check the files of a run folder that the report shows."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmil_fast.errors import UsageError
from hmil_fast.io.store import slide_dirname
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import all_levels, decide
from hmil_fast.runs.predictions import Prediction, read_predictions, stack_leaves


@dataclass(frozen=True)
class ReportData:
    """What the report shows of a run, or of another cohort, read from its folder.

    Attributes:
        name: Name of the folder.
        tree: The label tree.
        metrics: metrics.json.
        rows: The prediction of every tested slide.
        truths: True node per level and row, int [L, n]; −1 where the label is a coarser node.
        probabilities: Per level float [n, K_l].
        answers: Answered node per level and row, int [L, n].
        folds: Fold per row, int [n].
        epochs: The epoch records of log.jsonl.
        config: Text of config.yaml, or None.
        views: What the viewer shows by slide id.
        sure: By slide id and fold the node that meets the risk, "" for the root; empty
            where there is no conformal.csv.
        left_out: Number of views that would make the page too large to open.
    """

    name: str
    tree: LabelTree
    metrics: dict[str, Any]
    rows: Sequence[Prediction]
    truths: NDArray[np.int64]
    probabilities: Sequence[NDArray[np.float64]]
    answers: NDArray[np.int64]
    folds: NDArray[np.int64]
    epochs: Sequence[dict[str, Any]]
    config: str | None
    views: dict[str, dict[str, Any]]
    left_out: int
    sure: dict[tuple[str, int], str]


def read_run(run: Path) -> ReportData:
    """Read a run folder.

    Raises:
        UsageError: A needed file is missing or damaged; names file, line and field.
    """
    tree = _tree(run / "tree.json")
    metrics = _json(run / "metrics.json")
    if not isinstance(metrics, dict) or not {"levels", "tree", "slides", "patients"} <= set(
        metrics.get("pooled") or ()
    ):
        raise UsageError(f"{run / 'metrics.json'} has no pooled metrics", _AGAIN)
    rows = read_predictions(run / "predictions.csv", tree)
    probabilities = all_levels(tree, stack_leaves(rows, tree))
    truths = [tree.path(row.label) for row in rows]
    views, left_out = _views(run, rows, probabilities)
    config = run / "config.yaml"
    return ReportData(
        name=run.resolve().name,
        tree=tree,
        metrics=metrics,
        rows=rows,
        truths=np.array(truths, dtype=np.int64).reshape(-1, tree.num_levels).T,
        probabilities=probabilities,
        answers=decide(tree, probabilities[-1]).nodes,
        folds=np.array([row.fold for row in rows], dtype=np.int64),
        epochs=read_epochs(run / "log.jsonl"),
        config=config.read_text(encoding="utf-8", errors="replace") if config.exists() else None,
        views=views,
        left_out=left_out,
        sure=_answers(run / "conformal.csv"),
    )


def view_file(run: Path, slide_id: str) -> Path:
    """Return the file of a slide's view in a run folder."""
    return run / "views" / f"{slide_dirname(slide_id)}.json"


def _views(
    run: Path, rows: Sequence[Prediction], probabilities: Sequence[NDArray[np.float64]]
) -> tuple[dict[str, dict[str, Any]], int]:
    """The views that fit into a page, by slide id, and how many do not."""
    numbers: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        numbers.setdefault(row.slide_id, []).append(number)
    views, left_out, room = {}, 0, _VIEW_BYTES
    for slide_id, mine in numbers.items():
        path = view_file(run, slide_id)
        size = path.stat().st_size if path.is_file() else 0
        if size > room:
            left_out += 1
            continue
        # a slide that several folds tested has the mean of their answers and of their attention
        view = read_view(path, [level[mine].mean(axis=0) for level in probabilities])
        if view is not None:
            views[slide_id] = view
            room -= size
    return views, left_out


def read_view(path: Path, probabilities: Sequence[NDArray[np.float64]]) -> dict[str, Any] | None:
    """A slide's view; None where there is none, or one of another forward than the prediction.

    Args:
        path: Its file.
        probabilities: What the run predicts for the slide, per level float [K_l].
    """
    try:
        view = json.loads(path.read_text(encoding="utf-8"))
        pairs = zip(view["probabilities"], probabilities, strict=True)
        same = all(np.allclose(shown, p, rtol=0, atol=0.02) for shown, p in pairs)
        whole = all(isinstance(view[name], kind) for name, kind in _VIEW_FIELDS.items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return dict(view) if same and whole else None


_VIEW_BYTES = 64 * 2**20  # in one page, which a browser must still open
_VIEW_FIELDS = {
    "size": list, "side": float, "tiles": int, "picture": str, "small": str, "limit": float,
    "unit": float, "cells": str, "cell_side": float, "cut": bool, "cuts": dict, "maps": list,
}  # fmt: skip
_AGAIN = "run hmil-fast evaluate on the run folder first"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", _AGAIN) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}", _AGAIN) from None


def _tree(path: Path) -> LabelTree:
    data = _json(path)
    try:
        tree = LabelTree.from_dict(data)
        tree.ancestors()
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"{path} is not a label tree ({error!r})", _AGAIN) from None
    return tree


def _answers(path: Path) -> dict[tuple[str, int], str]:
    """Nodes by slide id and fold; none where the file is missing or damaged."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return {(row["slide_id"], int(row["fold"])): row["node"] or "" for row in rows}
    except (OSError, csv.Error, ValueError, KeyError):
        return {}


def read_epochs(path: Path) -> list[dict[str, Any]]:
    """Read the epoch records of a log; skip cut lines, keep the later of an epoch trained twice."""
    if not path.is_file():
        return []
    records: dict[tuple[int, int], dict[str, Any]] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if not isinstance(record, dict) or record.get("event") != "epoch":
                continue
            if isinstance(record.get("fold"), int) and isinstance(record.get("epoch"), int):
                records[record["fold"], record["epoch"]] = record
    return list(records.values())
