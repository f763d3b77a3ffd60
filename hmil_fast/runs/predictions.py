"""Predictions of slides, and the writing and reading of predictions.csv."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import all_levels, decide, likelier_elsewhere
from hmil_fast.runs.run import Run, write_csv

_FIX = (
    "delete it, and run again the command that makes it: `hmil-fast train` for a run, "
    "`hmil-fast evaluate` for another cohort"
)


@dataclass(frozen=True)
class Prediction:
    """The prediction of one slide.

    Attributes:
        fold: The fold whose model predicts, or -1 for the mean over all folds.
        probabilities: Per level, coarse first, float64 [K_l]; a parent is the sum of its children.
            Under the balanced prior, unless `hmil_fast.evaluation.prior.under_prior` changed it.
        heads: Per level above the leaves the softmax of its own head.
    """

    slide_id: str
    patient_id: str
    fold: int
    label: str
    num_tiles: int
    probabilities: tuple[NDArray[np.float64], ...]
    heads: tuple[NDArray[np.float64], ...] = ()


def prediction_columns(
    tree: LabelTree,
    predictions: Sequence[Prediction],
    more: Mapping[str, Sequence[object]] | None = None,
    *,
    heads: bool = False,
) -> dict[str, list[object]]:
    """The columns of predictions.csv by name, each with one value a slide.

    ``prediction`` is the leaf that `hmil_fast.metrics.decide` answers, ``prediction_<level>`` the
    node above it, ``likelier_elsewhere`` the nodes off this path that are likelier than the path's
    node of their level, ``p<level>_<node>`` a probability; a chain of only children has one column.

    Args:
        tree: The label tree.
        predictions: The predictions.
        more: Further columns.
        heads: Whether to add ``h<level>_<node>``, the softmax of the heads above the leaves.
    """
    p_leaf = stack_leaves(predictions, tree)
    path, elsewhere = decide(tree, p_leaf), likelier_elsewhere(tree, p_leaf)
    *above, leaves = (
        [names[k] for k in nodes] for names, nodes in zip(tree.names, path.nodes, strict=True)
    )
    columns: dict[str, list[object]] = {
        "slide_id": [p.slide_id for p in predictions],
        "patient_id": [p.patient_id for p in predictions],
        "fold": [p.fold for p in predictions],
        "label": [p.label for p in predictions],
        "prediction": leaves,
        "num_tiles": [p.num_tiles for p in predictions],
        **{f"prediction_{level}": names for level, names in enumerate(above)},
        "likelier_elsewhere": ["|".join(names) for names in elsewhere],
    }
    for level, k in sorted(tree.nodes):
        columns[f"p{level}_{tree.names[level][k]}"] = [
            float(p.probabilities[level][k]) for p in predictions
        ]
    for level, names in enumerate(tree.names[:-1] if heads else ()):
        for k, name in enumerate(names):
            columns[f"h{level}_{name}"] = [float(p.heads[level][k]) for p in predictions]
    return columns | {name: list(values) for name, values in (more or {}).items()}


def write_predictions(
    to: Path | TextIO,
    tree: LabelTree,
    predictions: Sequence[Prediction],
    more: Mapping[str, Sequence[object]] | None = None,
    *,
    heads: bool = False,
) -> None:
    """Write `prediction_columns` as CSV, one row a slide, numbers with nine digits.

    Raises:
        UsageError: The file cannot be written.
    """
    columns = prediction_columns(tree, predictions, more, heads=heads)
    rows = (
        [f"{value:.9g}" if isinstance(value, float) else value for value in row]
        for row in zip(*columns.values(), strict=True)
    )
    write_csv(to, [list(columns), *rows])


def read_predictions(path: Path, tree: LabelTree) -> list[Prediction]:
    """Read what `write_predictions` wrote, in the order of its rows.

    The probabilities above the leaves are summed from those of the leaves. `heads` is empty where
    the file holds none, and a label may be "".

    Raises:
        UsageError: The file is missing or damaged, or is of another label tree; names the line.
    """
    leaves = [f"p{tree.num_levels - 1}_{name}" for name in tree.leaves]
    heads = [[f"h{l}_{name}" for name in names] for l, names in enumerate(tree.names[:-1])]
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or ()
            for row in reader:
                rows.append(row)
                lines.append(reader.line_num)
    except OSError as error:
        raise UsageError(f"cannot read the predictions {path}: {error.strerror}", _FIX) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a CSV table: {error}", _FIX) from None
    for name in ("slide_id", "patient_id", "fold", "label", "num_tiles", *leaves):
        if name not in header:
            raise UsageError(f"{path} has no column {name}", _FIX)
    if any(name not in header for level in heads for name in level):
        heads = []
    p_leaf = np.zeros((len(rows), len(leaves)))
    predictions = []
    for i, (row, line) in enumerate(zip(rows, lines, strict=True)):
        try:
            p_leaf[i] = [float(row[name]) for name in leaves]
            predictions.append(
                Prediction(
                    row["slide_id"],
                    row["patient_id"],
                    int(row["fold"]),
                    row["label"],
                    int(row["num_tiles"]),
                    (),
                    tuple(np.array([float(row[name]) for name in level]) for level in heads),
                )
            )
            if row["label"]:
                tree.path(row["label"])
        except UsageError as error:
            raise UsageError(f"{path} line {line}: {error.what}", _FIX) from None
        except (TypeError, ValueError) as error:
            raise UsageError(f"{path} line {line}: {error}", _FIX) from None
    levels = zip(*all_levels(tree, p_leaf), strict=True)
    return [replace(p, probabilities=level) for p, level in zip(predictions, levels, strict=True)]


def run_predictions(run: Run) -> list[Prediction]:
    """The predictions of all tested slides, fold by fold, under the balanced prior.

    Raises:
        UsageError: A fold is not trained to its end, or its predictions are damaged.
    """
    return [
        prediction
        for fold in range(len(run.folds))
        for prediction in read_predictions(run.fold_path(fold) / "predictions.csv", run.tree)
    ]


def stack_leaves(predictions: Sequence[Prediction], tree: LabelTree) -> NDArray[np.float64]:
    """Leaf probabilities of all slides, float64 [n, leaves]."""
    return np.array([p.probabilities[-1] for p in predictions]).reshape(-1, len(tree.leaves))


def stack_heads(predictions: Sequence[Prediction]) -> list[NDArray[np.float64]]:
    """Per level above the leaves the softmax of its head for all slides, float64 [n, K_l]."""
    return [np.stack(level) for level in zip(*(p.heads for p in predictions), strict=True)]
