"""Conformal predictions on the tree: the deepest node, and the set of leaves, at an error rate.

Split-conformal prediction (Vovk et al. 2005): scores of held-out slides give a threshold under
which a new slide's answer contains its true leaf with probability 1 − risk, whatever the model,
if the new slide and the held-out ones are exchangeable.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmil_fast.labels import LabelTree
from hmil_fast.metrics.bootstrap import bootstrap
from hmil_fast.metrics.decision import decide
from hmil_fast.metrics.flat import Floats, Ints, ratio
from hmil_fast.metrics.summary import cell
from hmil_fast.metrics.tree import own_nodes

Bools = NDArray[np.bool_]


def threshold(scores: Floats, risk: float) -> float:
    """The ⌈(n + 1)(1 − risk)⌉-th smallest score: infinite when n is too small for the risk.

    Args:
        scores: Of held-out slides, float [n]; small where the model is right.
        risk: Asked share of answers without the true leaf, in (0, 1).
    """
    rank = math.ceil((len(scores) + 1) * (1 - risk) - 1e-9)
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else math.inf


def slides_needed(risk: float) -> int:
    """The fewest held-out slides that can promise a risk."""
    return math.ceil(1 / risk - 1e-9) - 1


def node_scores(tree: LabelTree, y_leaf: Ints, p_leaf: Floats) -> Floats:
    """Probability of the first wrong node on the decided path; 0 where all are right.

    An answer that stops above that node is right, and it does if the threshold is no smaller.
    """
    way = decide(tree, p_leaf)
    right = (way.nodes == tree.ancestors()[:, y_leaf]).sum(axis=0)
    beyond = np.vstack([way.masses, np.zeros(len(y_leaf))])
    return np.asarray(beyond[right, np.arange(len(y_leaf))])


def answer_nodes(tree: LabelTree, p_leaf: Floats, limit: float) -> tuple[Ints, Ints]:
    """The deepest node on the decided path whose probability exceeds the threshold.

    Returns:
        Level int64 [n], −1 for the root, and node of that level int64 [n], 0 for the root.
    """
    way = decide(tree, p_leaf)
    level = (way.masses > limit).sum(axis=0) - 1
    return level, np.where(level < 0, 0, way.nodes[level, np.arange(way.nodes.shape[1])])


def node_contains(tree: LabelTree, level: Ints, node: Ints, leaf: Ints) -> Bools:
    """Whether a leaf lies below a node, or is it, bool [n]; all lie below the root."""
    above = tree.ancestors()[np.maximum(level, 0), leaf]
    return np.asarray((level < 0) | (above == node))


def node_depth(tree: LabelTree, level: Ints, node: Ints) -> Ints:
    """Edges from the root to a node, int64 [n]; repeats of a leaf that lies high count once."""
    up, real = tree.ancestors(), own_nodes(tree)
    below = np.zeros(len(level), dtype=np.int64)
    for i, (l, k) in enumerate(zip(level, node, strict=True)):
        below[i] = np.flatnonzero(up[l] == k)[0] if l >= 0 else 0
    depth = np.vstack([np.zeros(len(up[0]), dtype=np.int64), real.cumsum(axis=0)])
    return np.asarray(depth[level + 1, below], dtype=np.int64)


def lac_scores(y_leaf: Ints, p_leaf: Floats) -> Floats:
    """1 − probability of the true leaf (LAC, Sadinle et al. 2019): the smallest sets."""
    return np.asarray(1 - p_leaf[np.arange(len(y_leaf)), y_leaf])


def lac_sets(tree: LabelTree, p_leaf: Floats, limit: float) -> Bools:
    """Leaves whose 1 − p is within the threshold, and the decided one, bool [n, leaves]."""
    return _with_decided(1 - p_leaf <= limit, tree, p_leaf)


def aps_scores(y_leaf: Ints, p_leaf: Floats) -> Floats:
    """Sum of all probabilities at least as large as the true leaf's (APS, Romano et al. 2020).

    Without the randomisation of the paper, so that a slide always gets the same set; coverage is
    then above what was asked rather than equal.
    """
    return np.asarray(_cumulative(p_leaf)[np.arange(len(y_leaf)), y_leaf])


def aps_sets(tree: LabelTree, p_leaf: Floats, limit: float) -> Bools:
    """Leaves from the likeliest on within the threshold, and the decided one, bool [n, leaves]."""
    return _with_decided(_cumulative(p_leaf) <= limit, tree, p_leaf)


def _cumulative(p: Floats) -> Floats:
    order = np.argsort(-p, axis=1, kind="stable")
    total = np.zeros_like(p)
    np.put_along_axis(total, order, np.cumsum(np.take_along_axis(p, order, 1), axis=1), 1)
    return total


def _with_decided(chosen: Bools, tree: LabelTree, p: Floats) -> Bools:
    """The sets with the decided leaf, so that none is empty; this only adds to the coverage."""
    chosen = chosen.copy()
    chosen[np.arange(len(p)), decide(tree, p).nodes[-1]] = True
    return chosen


@dataclass(frozen=True)
class Answers:
    """Conformal answers for n slides.

    Attributes:
        level: Level of the answered node, int64 [n]; −1 for the root.
        node: Index of the node on its level, int64 [n].
        lac: Set of leaves, bool [n, leaves].
        aps: Set of leaves, bool [n, leaves].
    """

    level: Ints
    node: Ints
    lac: Bools
    aps: Bools


def conformal_answers(
    tree: LabelTree, held_out: tuple[Ints, Floats], p_leaf: Floats, risk: float
) -> Answers:
    """Answers for new slides, calibrated on held-out ones of the same model.

    Args:
        tree: The label tree.
        held_out: True leaves int [m] and leaf probabilities float [m, leaves].
        p_leaf: Leaf probabilities of the new slides, float [n, leaves].
        risk: Asked share of answers without the true leaf, in (0, 1).
    """
    y, p = held_out
    level, node = answer_nodes(tree, p_leaf, threshold(node_scores(tree, y, p), risk))
    return Answers(
        level,
        node,
        lac_sets(tree, p_leaf, threshold(lac_scores(y, p), risk)),
        aps_sets(tree, p_leaf, threshold(aps_scores(y, p), risk)),
    )


def join_answers(parts: Sequence[Answers]) -> Answers:
    """Answers of several folds, one behind the other."""
    return Answers(
        *(np.concatenate([getattr(p, name) for p in parts]) for name in Answers.__annotations__)
    )


def conformal_summary(
    tree: LabelTree, y_leaf: Ints, answers: Answers, patients: Sequence[str], draws: tuple[int, int]
) -> dict[str, Any]:
    """How often the answers hold the true leaf, and how much they say.

    Args:
        tree: The label tree.
        y_leaf: True leaves, int [n].
        answers: Answers for the n slides.
        patients: Patient of each slide, [n].
        draws: Number of bootstrap draws for the intervals, and their seed.

    Returns:
        ``{"node": {"coverage", "mean_depth", "leaf_share", "root_share", "mean_leaves": cell,
        "depths": {depth: slides}}, "lac": {"coverage", "mean_size", "single_share": cell},
        "aps": as lac, "leaves": {leaf: {"slides": n, "node", "lac", "aps": share covered}}}``.
    """
    rows = np.arange(len(y_leaf))
    depth = node_depth(tree, answers.level, answers.node)
    below = np.stack([node_contains(tree, answers.level, answers.node, rows * 0 + k)
                      for k in range(len(tree.leaves))], 1)  # fmt: skip
    held = {"node": below, "lac": answers.lac, "aps": answers.aps}
    sizes = {name: chosen.sum(axis=1) for name, chosen in held.items()}
    covered = {name: chosen[rows, y_leaf] for name, chosen in held.items()}
    per_slide = {
        "node/coverage": covered["node"],
        "node/mean_depth": depth,
        "node/leaf_share": sizes["node"] == 1,
        "node/root_share": answers.level < 0,
        "node/mean_leaves": sizes["node"],
    }
    for name in ("lac", "aps"):
        per_slide[f"{name}/coverage"] = covered[name]
        per_slide[f"{name}/mean_size"] = sizes[name]
        per_slide[f"{name}/single_share"] = sizes[name] == 1

    def means(weights: Floats) -> dict[str, Floats]:
        total = weights.sum(axis=1)
        return {k: ratio(weights @ v.astype(np.float64), total) for k, v in per_slide.items()}

    result: dict[str, Any] = {"node": {}, "lac": {}, "aps": {}}
    intervals = bootstrap(means, patients, *draws)
    for key, value in means(np.ones((1, len(rows)))).items():
        kind, name = key.split("/")
        if np.isfinite(value[0]):
            result[kind][name] = cell(float(value[0]), intervals.get(key))
    counts = np.bincount(depth, minlength=tree.num_levels + 1)
    result["node"]["depths"] = {str(d): int(n) for d, n in enumerate(counts)}
    result["leaves"] = {
        leaf: {"slides": int((y_leaf == k).sum())}
        | {name: float(hit[y_leaf == k].mean()) for name, hit in covered.items()}
        for k, leaf in enumerate(tree.leaves)
        if (y_leaf == k).any()
    }
    return result
