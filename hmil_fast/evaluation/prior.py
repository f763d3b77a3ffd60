"""The prior of a run's answers: how frequent each leaf is where the answers are used."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hmil_fast.config import loss_settings
from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import all_levels, balanced_prior, shares_learnt, with_prior
from hmil_fast.metrics.flat import Floats
from hmil_fast.runs.predictions import Prediction
from hmil_fast.runs.run import Run
from hmil_fast.tables import read_table


@dataclass(frozen=True)
class Prior:
    """Leaf shares with their name.

    Attributes:
        name: "balanced", "cohort", or the file that they were read from.
        leaves: Share of each leaf, in the order of the tree; they sum to 1.
    """

    name: str
    leaves: tuple[float, ...]

    def described(self, tree: LabelTree) -> dict[str, Any]:
        """The prior as metrics.json holds it."""
        return {"name": self.name, "leaves": dict(zip(tree.leaves, self.leaves, strict=True))}


def balanced(tree: LabelTree) -> Prior:
    """The children of every node alike (`hmil_fast.metrics.balanced_prior`)."""
    return Prior("balanced", tuple(balanced_prior(tree).tolist()))


def read_prior(run: Run, name: str) -> Prior:
    """The prior of that name.

    Args:
        run: The run whose answers it is for.
        name: "balanced"; "cohort", the leaf shares of the run's slides; or a CSV file with the
            columns ``label,share``. Shares may be counts. A leaf that is not in the file has share
            0; the share of an inner node is spread evenly over the children of every node below.

    Raises:
        UsageError: The file cannot be read, names no node of the tree, or a share is negative.
    """
    if name == "balanced":
        return balanced(run.tree)
    if name == "cohort":
        counts = Counter(slide.label for slide in run.slides)
        return _prior(name, [counts.get(leaf, 0) for leaf in run.tree.leaves])
    fix = (
        "give --prior balanced, cohort, or a CSV file with the columns label,share; the labels are "
        f"nodes of the tree, for instance {run.tree.leaves[0]}"
    )
    path = Path(name)
    if not path.exists():
        raise UsageError(f"there is no prior {name!r}", fix)
    table = read_table(path, ("label", "share"))
    if not table.rows or not {"label", "share"} <= set(table.columns):
        raise UsageError(f"the prior {path} has no rows with the columns label,share", fix)
    even = balanced_prior(run.tree)
    shares = np.zeros(len(run.tree.leaves))
    for line, row in table.rows:
        text = table.cell(row, "share")
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0 <= share < float("inf"):
            raise UsageError(f"{path} line {line}: the share is {text!r}", "give 0 or more")
        try:
            below = run.tree.below(table.cell(row, "label"))
        except UsageError as error:
            raise UsageError(f"{path} line {line}: {error.what}", fix) from None
        chosen = np.isin(run.tree.leaves, below)
        shares[chosen] += share * even[chosen] / even[chosen].sum()
    if not shares.sum() > 0:
        raise UsageError(f"all shares of the prior {path} are 0", "give one leaf at least a share")
    return _prior(name, shares)


def _prior(name: str, shares: Sequence[float] | Floats) -> Prior:
    total = float(np.sum(shares))
    return Prior(name, tuple(float(share) / total for share in shares))


def current_prior(run: Run) -> Prior:
    """The prior of the run's last evaluation, balanced before any."""
    told = last_evaluation(run).get("prior") or {}
    try:
        prior = Prior(str(told["name"]), tuple(float(told["leaves"][k]) for k in run.tree.leaves))
    except (TypeError, KeyError, ValueError):
        return balanced(run.tree)
    sound = np.isfinite(prior.leaves).all() and min(prior.leaves) >= 0 and sum(prior.leaves) > 0
    return prior if sound else balanced(run.tree)


def last_evaluation(run: Run) -> dict[str, Any]:
    """metrics.json of the run; empty where there is none that can be read."""
    try:
        return dict(json.loads((run.path / "metrics.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def trained_shares(run: Run, fold: int) -> list[Floats]:
    """Per level the shares of the nodes that a fold learnt from (`shares_learnt`)."""
    parts = set(run.folds[fold].train)
    counts = Counter(slide.label for slide in run.slides if slide.slide_id in parts)
    return shares_learnt(
        run.tree,
        [counts.get(leaf, 0) for leaf in run.tree.leaves],
        weighed_alike=loss_settings(run.config).class_weights == "balanced",
        drawn_alike=run.config.balance == "leaf",
    )


def under_prior(
    tree: LabelTree, predictions: Sequence[Prediction], prior: Prior
) -> list[Prediction]:
    """Predictions under another prior than the balanced one that folds write them under."""
    old, new = balanced_prior(tree), np.array(prior.leaves)
    found = []
    for p in predictions:
        levels = all_levels(tree, with_prior(tree, p.probabilities[-1][None], old, new))
        found.append(replace(p, probabilities=tuple(level[0] for level in levels)))
    return found
