"""Metrics that know the tree: how near to the truth a wrong diagnosis lies."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hmil_fast.labels import LabelTree
from hmil_fast.metrics.flat import Floats, Ints, checked, ratio


def summed(tree: LabelTree, p_leaf: Floats) -> list[Floats]:
    """Probabilities of the levels above the leaves as sums over the leaves below each node.

    Args:
        tree: The label tree.
        p_leaf: Leaf probabilities, float [n, leaves].

    Returns:
        Per level above the leaves, coarse first, float64 [n, K_l]; consistent by construction.
    """
    levels = [np.asarray(p_leaf, dtype=np.float64)]
    for level in range(tree.num_levels - 1, 0, -1):
        below = levels[0]
        above = np.zeros((len(below), tree.num_classes[level - 1]))
        np.add.at(above.T, np.asarray(tree.parents[level - 1], dtype=np.int64), below.T)
        levels.insert(0, above)
    return levels[:-1]


def tree_metrics(
    tree: LabelTree,
    y_leaf: Ints,
    p_leaf: Floats,
    p_above: Sequence[Floats] = (),
    heads: Sequence[Floats] = (),
) -> dict[str, float]:
    """Hierarchical metrics of leaf predictions; an undefined metric is absent.

    * ``hierarchical_precision``, ``_recall``, ``_f1`` (Kiritchenko et al. 2006): with T and P the
      sets of a slide's true and predicted leaf and all their ancestors but the root,
      Σ|T ∩ P| / Σ|P|, Σ|T ∩ P| / Σ|T| and their harmonic mean. A leaf that the tree repeats down
      to the last level counts once, so the two differ where leaves lie at different depths.
    * ``mean_tree_distance``: edges between true and predicted leaf, over all slides; repeats of a
      leaf add none.
    * ``mistake_severity`` (Bertinetto et al. 2020, in edges): the same over the mistakes only;
      absent when there are none.
    * ``agreement_<l>``: share of slides for which level l's own prediction is the ancestor of the
      predicted leaf; only for the levels given.
    * ``head_against_sum_<l>``, ``head_against_leaf_<l>``: share of slides for which the prediction
      of level l's own head is not the node with the largest sum of leaf probabilities, or not the
      ancestor of the predicted leaf; only for the heads given.

    Args:
        tree: The label tree.
        y_leaf: True leaves, int [n].
        p_leaf: Leaf probabilities, float [n, leaves].
        p_above: Probabilities per level above the leaves, coarse first, float [n, K_l] each.
        heads: What the heads of these levels say, which need not be what the run answers.
    """
    y_leaf, p_leaf = checked(y_leaf, p_leaf)
    if not len(y_leaf):
        return {}
    weights = np.ones((1, len(y_leaf)))
    values = weighted_tree_metrics(tree, y_leaf, [*p_above, p_leaf], weights, heads)
    return {name: float(v[0]) for name, v in values.items() if np.isfinite(v[0])}


def weighted_tree_metrics(
    tree: LabelTree,
    y_leaf: Ints,
    levels: Sequence[Floats],
    weights: Floats,
    heads: Sequence[Floats] = (),
) -> dict[str, Floats]:
    """`tree_metrics` of all levels for every row of weights [draws, n]; NaN where undefined."""
    *p_above, p_leaf = levels
    predicted = p_leaf.argmax(axis=1)
    up = tree.ancestors()
    real = own_nodes(tree)
    shared = ((up[:, y_leaf] == up[:, predicted]) & real[:, y_leaf] & real[:, predicted]).sum(0)
    common = weights @ shared.astype(np.float64)
    depth_true, depth_predicted = real[:, y_leaf].sum(0), real[:, predicted].sum(0)
    precision = ratio(common, weights @ depth_predicted.astype(np.float64))
    recall = ratio(common, weights @ depth_true.astype(np.float64))
    away = (depth_true + depth_predicted - 2 * shared).astype(np.float64)
    wrong = (y_leaf != predicted).astype(np.float64)
    total = weights.sum(axis=1)
    values = {
        "hierarchical_precision": precision,
        "hierarchical_recall": recall,
        # both 0 is an F1 of 0, not undefined
        "hierarchical_f1": np.where(
            precision + recall == 0, 0.0, ratio(2 * precision * recall, precision + recall)
        ),
        "mean_tree_distance": ratio(weights @ away, total),
        "mistake_severity": ratio(weights @ away, weights @ wrong),
    }
    for level, p in enumerate(p_above):
        agrees = (np.asarray(p).argmax(axis=1) == up[level, predicted]).astype(np.float64)
        values[f"agreement_{level}"] = ratio(weights @ agrees, total)
    sums = summed(tree, p_leaf) if heads else []
    for level, (head, total_p) in enumerate(zip(heads, sums, strict=True)):
        said = np.asarray(head).argmax(axis=1)
        for name, other in (("sum", total_p.argmax(axis=1)), ("leaf", up[level, predicted])):
            apart = (said != other).astype(np.float64)
            values[f"head_against_{name}_{level}"] = ratio(weights @ apart, total)
    return values


def own_nodes(tree: LabelTree) -> NDArray[np.bool_]:
    """Which of a leaf's nodes [L, leaves] are nodes of the file, not repeats of the one above."""
    up = tree.ancestors()
    real = np.ones(up.shape, dtype=bool)
    for level, parents in enumerate(tree.parents, start=1):
        for node, parent in enumerate(parents):
            only_child = parents.count(parent) == 1
            if only_child and tree.names[level][node] == tree.names[level - 1][parent]:
                real[level, up[level] == node] = False
    return real
