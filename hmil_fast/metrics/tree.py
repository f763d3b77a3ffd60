"""Metrics on the tree: hierarchical F1, and the distance of wrong answers from the truth."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hmil_fast.labels import LabelTree
from hmil_fast.metrics.decision import decide
from hmil_fast.metrics.flat import Floats, Ints, checked, ratio


def tree_metrics(
    tree: LabelTree,
    y_leaf: Ints,
    p_leaf: Floats,
    heads: Sequence[Floats] = (),
) -> dict[str, float]:
    """Hierarchical metrics of the decisions (`decide`); an undefined metric is absent.

    * ``hierarchical_precision``, ``_recall``, ``_f1`` (Kiritchenko et al. 2006): with T and P the
      sets of a slide's true and predicted leaf and all their ancestors but the root,
      Σ|T ∩ P| / Σ|P|, Σ|T ∩ P| / Σ|T| and their harmonic mean. A leaf that the tree repeats down
      to the last level counts once, so the two differ where leaves lie at different depths.
    * ``mean_tree_distance``: edges between true and predicted leaf, over all slides; repeats of a
      leaf add none.
    * ``mistake_severity`` (Bertinetto et al. 2020, in edges): the same over the mistakes only;
      absent when there are none.
    * ``head_against_answer_<l>``: share of slides for which level l's own head prefers another
      node than the answer's; only for the heads given.

    Args:
        tree: The label tree.
        y_leaf: True leaves, int [n].
        p_leaf: Leaf probabilities, float [n, leaves].
        heads: Softmax of the heads above the leaves, coarse first, float [n, K_l] each.
    """
    y_leaf, p_leaf = checked(y_leaf, p_leaf)
    if not len(y_leaf):
        return {}
    weights = np.ones((1, len(y_leaf)))
    values = weighted_tree_metrics(tree, y_leaf, decide(tree, p_leaf).nodes, weights, heads)
    return {name: float(v[0]) for name, v in values.items() if np.isfinite(v[0])}


def weighted_tree_metrics(
    tree: LabelTree,
    y_leaf: Ints,
    answers: Ints,
    weights: Floats,
    heads: Sequence[Floats] = (),
) -> dict[str, Floats]:
    """`tree_metrics` of answers int [L, n] for every row of weights; NaN where undefined."""
    predicted = answers[-1]
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
    for level, head in enumerate(heads):
        differs = (np.asarray(head).argmax(axis=1) != answers[level]).astype(np.float64)
        values[f"head_against_answer_{level}"] = ratio(weights @ differs, total)
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
