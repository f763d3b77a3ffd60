"""What the report needs of a run folder, read and checked."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree


@dataclass(frozen=True)
class Run:
    """A run folder in memory; `rows` are the lines of predictions.csv.

    Attributes:
        name: Name of the folder.
        tree: The label tree.
        metrics: metrics.json.
        rows: Per tested slide the columns of predictions.csv.
        y_leaf: True leaf per row, int [n].
        probabilities: Per level float [n, K_l].
        folds: Fold per row, int [n].
        epochs: The epoch records of log.jsonl.
        config: Text of config.yaml, or None.
        heatmaps: Path of the heatmap per row, or None.
    """

    name: str
    tree: LabelTree
    metrics: dict[str, Any]
    rows: Sequence[dict[str, str]]
    y_leaf: NDArray[np.int64]
    probabilities: Sequence[NDArray[np.float64]]
    folds: NDArray[np.int64]
    epochs: Sequence[dict[str, Any]]
    config: str | None
    heatmaps: Sequence[Path | None]


def read_run(run: Path) -> Run:
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
    rows, y_leaf, probabilities, folds = _predictions(run / "predictions.csv", tree)
    heatmaps = [run / "heatmaps" / f"{quote(row['slide_id'], safe='')}.png" for row in rows]
    config = run / "config.yaml"
    return Run(
        name=run.resolve().name,
        tree=tree,
        metrics=metrics,
        rows=rows,
        y_leaf=y_leaf,
        probabilities=probabilities,
        folds=folds,
        epochs=_epochs(run / "log.jsonl"),
        config=config.read_text(encoding="utf-8", errors="replace") if config.exists() else None,
        heatmaps=[path if path.is_file() else None for path in heatmaps],
    )


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
        raise UsageError(f"{path} is no label tree ({error!r})", _AGAIN) from None
    return tree


def _predictions(
    path: Path, tree: LabelTree
) -> tuple[list[dict[str, str]], NDArray[np.int64], list[NDArray[np.float64]], NDArray[np.int64]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            header = reader.fieldnames or ()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", _AGAIN) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no CSV table: {error}", _AGAIN) from None
    columns = [[f"p{level}_{name}" for name in names] for level, names in enumerate(tree.names)]
    for name in ("slide_id", "patient_id", "fold", "label", "prediction", "num_tiles"):
        if name not in header:
            raise UsageError(f"{path} has no column {name}", _AGAIN)
    for name in (name for level in columns for name in level):
        if name not in header:
            raise UsageError(f"{path} has no column {name}, which the tree asks for", _AGAIN)
    probabilities = [np.zeros((len(rows), len(level))) for level in columns]
    y_leaf, folds = np.zeros((2, len(rows)), dtype=np.int64)
    for number, row in enumerate(rows):
        try:
            folds[number] = int(row["fold"])
            for level, names in enumerate(columns):
                probabilities[level][number] = [float(row[name]) for name in names]
        except (TypeError, ValueError) as error:
            raise UsageError(f"{path} line {number + 2}: {error}", _AGAIN) from None
        if row["label"] not in tree.leaves or row["prediction"] not in tree.leaves:
            raise UsageError(
                f"{path} line {number + 2}: label {row['label']!r} or prediction "
                f"{row['prediction']!r} is no leaf of the tree",
                _AGAIN,
            )
        y_leaf[number] = tree.leaf(row["label"])
    return rows, y_leaf, probabilities, folds


def _epochs(path: Path) -> list[dict[str, Any]]:
    """Epoch records, without lines cut short by a crash; of an epoch trained twice, the last."""
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
