"""Read a prior over the leaves (file, cohort, last evaluation), and apply it to predictions."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import all_levels, balanced_prior, training_shares, with_prior
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

    def to_dict(self, tree: LabelTree) -> dict[str, Any]:
        """The prior as metrics.json holds it."""
        return {"name": self.name, "leaves": dict(zip(tree.leaves, self.leaves, strict=True))}


def balanced(tree: LabelTree) -> Prior:
    """The prior under which the children of every node are equally frequent."""
    return Prior("balanced", tuple(balanced_prior(tree).tolist()))


def resolve_prior(run: Run, prior: Prior | str | None) -> Prior:
    """A prior as it is, by its name as in `read_prior`, or that of the run's last evaluation."""
    if prior is None:
        return current_prior(run)
    return read_prior(run, prior) if isinstance(prior, str) else prior


def read_prior(run: Run, name: str) -> Prior:
    """Read a prior by its name.

    Args:
        run: The run whose predictions it is for.
        name: "balanced"; "cohort", the leaf shares of the run's slides; or a CSV file with the
            columns ``label,share``. Shares may be counts. A leaf that is not in the file has share
            0. The share of an inner node is spread evenly over the children of every node below it.

    Raises:
        UsageError: The file cannot be read, names a label outside the tree, or a share is negative.
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
        raise UsageError(f"there is no prior {name!r}, and no such file", fix)
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
            raise UsageError(
                f"{path} line {line}: the share is {text!r}", "give a number from 0 up"
            )
        try:
            below = run.tree.below(table.cell(row, "label"))
        except UsageError as error:
            raise UsageError(f"{path} line {line}: {error.what}", fix) from None
        chosen = np.isin(run.tree.leaves, below)
        shares[chosen] += share * even[chosen] / even[chosen].sum()
    if not shares.sum() > 0:
        raise UsageError(f"all shares of the prior {path} are 0", "give at least one leaf a share")
    return _prior(name, shares)


def _prior(name: str, shares: Sequence[float] | Floats) -> Prior:
    total = float(np.sum(shares))
    return Prior(name, tuple(float(share) / total for share in shares))


def current_prior(run: Run) -> Prior:
    """The prior of the run's last evaluation; balanced before the first one."""
    stored = last_evaluation(run).get("prior") or {}
    try:
        shares = tuple(float(stored["leaves"][leaf]) for leaf in run.tree.leaves)
        prior = Prior(str(stored["name"]), shares)
    except (TypeError, KeyError, ValueError):
        return balanced(run.tree)
    valid = np.isfinite(prior.leaves).all() and min(prior.leaves) >= 0 and sum(prior.leaves) > 0
    return prior if valid else balanced(run.tree)


def last_evaluation(run: Run) -> dict[str, Any]:
    """metrics.json of the run; empty where there is none that can be read."""
    try:
        return dict(json.loads((run.path / "metrics.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def trained_shares(run: Run, fold: int) -> list[Floats]:
    """Per level the node shares that a fold was trained with, float64 [K_l] (`training_shares`)."""
    slide_ids = set(run.folds[fold].train)
    counts = Counter(slide.label for slide in run.slides if slide.slide_id in slide_ids)
    return training_shares(
        run.tree,
        [counts.get(leaf, 0) for leaf in run.tree.leaves],
        balanced_loss=run.config.recipe.class_weights == "balanced",
        balanced_sampling=run.config.recipe.balance == "leaf",
    )


def under_prior(
    tree: LabelTree, predictions: Sequence[Prediction], prior: Prior
) -> list[Prediction]:
    """Predictions under a prior, from those of the folds, which are under the balanced prior."""
    old, new = balanced_prior(tree), np.array(prior.leaves)

    def probabilities(p_leaf: Floats) -> tuple[Floats, ...]:
        levels = all_levels(tree, with_prior(tree, p_leaf[None], old, new))
        return tuple(level[0] for level in levels)

    return [replace(p, probabilities=probabilities(p.probabilities[-1])) for p in predictions]
