"""Convert softmax probabilities to another prior, and choose one path from root to leaf.

A level that learnt from the shares π of its nodes gives p(node | slide) for such a cohort, and p/π
is the class-conditional evidence for the node (Bayes' rule; Saerens et al. 2002). A parent has the
evidence of its best leaf: a class gains nothing by having more leaves. At every node of the tree

    p(child | parent) ∝ prior(child | parent) · evidence(child),

and p(leaf) is the product along its path. The answer takes the likeliest child at every node. Under
the balanced prior, where the children of a node are alike, that is the leaf with the most evidence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hmil_fast.labels import LabelTree
from hmil_fast.metrics.flat import Floats, Ints


def all_levels(tree: LabelTree, p_leaf: Floats) -> list[Floats]:
    """Probabilities of every level, coarse first, float64 [n, K_l]; a parent sums its children.

    Args:
        tree: The label tree.
        p_leaf: Leaf probabilities, float [n, leaves].
    """
    levels = [np.asarray(p_leaf, dtype=np.float64)]
    for level in range(tree.num_levels - 1, 0, -1):
        above = np.zeros((len(levels[0]), tree.num_classes[level - 1]))
        np.add.at(above.T, np.asarray(tree.parents[level - 1], dtype=np.int64), levels[0].T)
        levels.insert(0, above)
    return levels


def balanced_prior(tree: LabelTree) -> Floats:
    """Leaf shares that make the children of every node alike, float64 [leaves]; they sum to 1.

    A class does not gain by having more leaves: with `benign` and `malignant: [a, b, c]` the shares
    are 1/2 and 3 × 1/6.
    """
    shares = np.full(tree.num_classes[0], 1 / tree.num_classes[0])
    for parents in tree.parents:
        above = np.asarray(parents, dtype=np.int64)
        shares = shares[above] / np.bincount(above, minlength=len(shares))[above]
    return shares


def training_shares(
    tree: LabelTree, counts: Sequence[int], *, balanced_loss: bool, balanced_sampling: bool = False
) -> list[Floats]:
    """Per level the shares of the nodes that it learnt from, float64 [K_l], coarse first.

    Heads above the leaves learn from the slides as they are drawn.

    Args:
        tree: The label tree.
        counts: Training slides of each leaf, [leaves]; a leaf without any counts as one slide.
        balanced_loss: Whether the loss weighs slides so that all leaves count alike.
        balanced_sampling: Whether all leaves are drawn alike.
    """
    seen = np.maximum(np.asarray(counts, dtype=np.float64), 1)
    alike = np.full(len(tree.leaves), 1 / len(tree.leaves))
    drawn = alike if balanced_sampling else seen / seen.sum()
    levels = [level[0] for level in all_levels(tree, drawn[None])]
    return [*levels[:-1], alike if balanced_loss else drawn]


def with_prior(tree: LabelTree, p_leaf: Floats, old: Floats, new: Floats) -> Floats:
    """Leaf probabilities under another prior, float64 [n, leaves].

    Args:
        tree: The label tree.
        p_leaf: Leaf probabilities under the prior `old`, float [n, leaves].
        old: Leaf shares, all above 0, float [leaves].
        new: Leaf shares, float [leaves]; a leaf with share 0 gets probability 0, unless nothing
            else is left.
    """
    ratios = zip(all_levels(tree, new[None]), all_levels(tree, old[None]), strict=True)
    levels = zip(all_levels(tree, p_leaf), ratios, strict=True)
    return _chained(tree, [p * (a / b) for p, (a, b) in levels])


def leaf_probabilities(
    tree: LabelTree, levels: Sequence[Floats], trained: Sequence[Floats], *, heads: bool
) -> Floats:
    """Leaf probabilities under the balanced prior, from what a model says of every level.

    Args:
        tree: The label tree.
        levels: Softmax of each level's logits, coarse first, float [n, K_l].
        trained: Shares of the nodes that each level learnt from, all above 0, float [K_l].
        heads: Whether a node above the leaves has the evidence of its own level's head; else it
            has that of its best leaf.

    Returns:
        float64 [n, leaves].
    """
    shares = all_levels(tree, balanced_prior(tree)[None])
    evidence = [
        np.asarray(p, dtype=np.float64) / old for p, old in zip(levels, trained, strict=True)
    ]
    if not heads:
        evidence = evidence[-1:]
        for level in range(tree.num_levels - 1, 0, -1):
            best = np.zeros((len(evidence[0]), tree.num_classes[level - 1]))
            np.maximum.at(best.T, np.asarray(tree.parents[level - 1]), evidence[0].T)
            evidence.insert(0, best)
    return _chained(tree, [e * share for e, share in zip(evidence, shares, strict=True)])


def _chained(tree: LabelTree, weights: Sequence[Floats]) -> Floats:
    """Leaf probabilities where p(child | parent) is proportional to the weights of the level."""
    p = np.ones((len(weights[0]), 1))
    for level, own in enumerate(weights):
        above = np.asarray(tree.parents[level - 1] if level else [0] * own.shape[1])
        family = np.zeros_like(p)
        np.add.at(family.T, above, own.T)
        size = np.bincount(above, minlength=p.shape[1])[above]
        known = family[:, above] > 0  # else all children are excluded: they are alike
        p = p[:, above] * np.where(known, own / np.where(known, family[:, above], 1), 1 / size)
    return p


@dataclass(frozen=True)
class TreePath:
    """The answers for n slides, each a path from the root to a leaf.

    Attributes:
        nodes: Node per level, int64 [L, n].
        masses: Its probability, the sum of the leaves below, float64 [L, n]; falls on the way.
    """

    nodes: Ints
    masses: Floats


def decide(tree: LabelTree, p_leaf: Floats) -> TreePath:
    """The path that takes the likeliest child at every node; of equals the first.

    Args:
        tree: The label tree.
        p_leaf: Leaf probabilities, float [n, leaves].
    """
    levels = all_levels(tree, p_leaf)
    rows = np.arange(len(levels[0]))
    nodes = [levels[0].argmax(axis=1)]
    for level, p in enumerate(levels[1:]):
        below = np.asarray(tree.parents[level])[None, :] == nodes[-1][:, None]
        nodes.append(np.where(below, p, -1.0).argmax(axis=1))
    masses = [p[rows, node] for p, node in zip(levels, nodes, strict=True)]
    return TreePath(np.stack(nodes).astype(np.int64), np.stack(masses))


def likelier_elsewhere(tree: LabelTree, p_leaf: Floats) -> list[list[str]]:
    """Per slide the names of nodes that are likelier than its path's node of their level.

    A chain of only children is one node and named once, by its deepest.
    """
    levels, path = all_levels(tree, p_leaf), decide(tree, p_leaf)
    found: list[list[str]] = []
    for i in range(len(levels[0])):
        nodes = [
            tree.node(level, int(p[i].argmax()))
            for level, p in enumerate(levels)
            if p[i].max() > path.masses[level, i]
        ]
        found.append([tree.names[level][k] for level, k in dict.fromkeys(nodes)])
    return found
