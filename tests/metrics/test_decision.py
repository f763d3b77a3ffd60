"""Priors by Bayes' rule, and one path of the tree for every slide."""

import numpy as np
import pytest

from hmil_fast.labels import LabelTree
from hmil_fast.metrics import (
    all_levels,
    balanced_prior,
    decide,
    leaf_probabilities,
    likelier_elsewhere,
    with_prior,
)

ONE_AND_FIVE = LabelTree.from_nested({"neg": ["neg"], "pos": list("abcde")})
DEEP = LabelTree.from_nested(
    {"normal": None, "tumour": {"benign": ["b1", "b2"], "malignant": ["low", "high"]}}
)


def test_children_of_every_node_have_the_same_share() -> None:
    assert balanced_prior(ONE_AND_FIVE) == pytest.approx([0.5, *[0.1] * 5])
    assert balanced_prior(DEEP) == pytest.approx([0.5, *[0.125] * 4])


def evidence_of(tree: LabelTree, n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(0.5, size=(n, len(tree.leaves))) + 1e-6


def posterior(tree: LabelTree, evidence: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """The formula of the module's head, leaf by leaf and slide by slide."""
    up = tree.ancestors()
    found = np.ones_like(evidence)
    for i, e in enumerate(evidence):
        for leaf in range(len(tree.leaves)):
            inside = np.ones(len(tree.leaves), dtype=bool)
            for level in range(tree.num_levels):
                weights = {
                    node: prior[inside & (up[level] == node)].sum()
                    * e[inside & (up[level] == node)].max()
                    for node in set(up[level][inside].tolist())
                }
                node = up[level][leaf]
                found[i, leaf] *= weights[node] / sum(weights.values())
                inside &= up[level] == node
    return found


@pytest.mark.parametrize("tree", [ONE_AND_FIVE, DEEP])
def test_probabilities_are_those_of_the_formula_under_any_prior(tree: LabelTree) -> None:
    n = len(tree.leaves)
    evidence = evidence_of(tree, 20, 0)
    learnt = np.arange(1.0, n + 1) / np.arange(1.0, n + 1).sum()
    model = evidence * learnt / (evidence * learnt).sum(axis=1, keepdims=True)
    levels = all_levels(tree, model)
    shares = [level[0] for level in all_levels(tree, learnt[None])]
    p = leaf_probabilities(tree, levels, shares, heads=False)
    assert p == pytest.approx(posterior(tree, evidence, balanced_prior(tree)))
    cohort = np.arange(n, 0.0, -1) / np.arange(n, 0.0, -1).sum()
    again = with_prior(tree, p, balanced_prior(tree), cohort)
    assert again == pytest.approx(posterior(tree, evidence, cohort))
    assert with_prior(tree, again, cohort, balanced_prior(tree)) == pytest.approx(p)


@pytest.mark.parametrize("tree", [ONE_AND_FIVE, DEEP])
def test_the_balanced_answer_is_the_leaf_with_the_most_evidence(tree: LabelTree) -> None:
    evidence = evidence_of(tree, 300, 1)
    even = [np.full(k, 1 / k) for k in tree.num_classes]
    model = evidence / evidence.sum(axis=1, keepdims=True)
    p = leaf_probabilities(tree, [*all_levels(tree, model)[:-1], model], even, heads=False)
    assert (decide(tree, p).nodes[-1] == evidence.argmax(axis=1)).all()


def test_a_leaf_that_the_prior_excludes_is_never_answered() -> None:
    p = np.array([[0.1, 0.5, 0.1, 0.1, 0.1, 0.1]])
    no_a = np.array([0.5, 0, 0.2, 0.1, 0.1, 0.1])
    got = with_prior(ONE_AND_FIVE, p, balanced_prior(ONE_AND_FIVE), no_a)
    assert got[0, 1] == 0
    assert got.sum() == pytest.approx(1)
    only = np.eye(6)[[1]]  # all of it on the leaf that is excluded
    got = with_prior(ONE_AND_FIVE, only, balanced_prior(ONE_AND_FIVE), np.eye(6)[0])
    assert np.isfinite(got).all()
    assert got.sum() == pytest.approx(1)


def test_a_class_gains_nothing_by_more_leaves() -> None:
    """A slide without evidence for anything, as a model that weighs leaves alike sees it."""
    even = np.full((1, 6), 1 / 6)
    shares = [np.array([0.5, 0.5]), np.full(6, 1 / 6)]
    p = leaf_probabilities(ONE_AND_FIVE, [np.array([[0.5, 0.5]]), even], shares, heads=False)
    assert all_levels(ONE_AND_FIVE, p)[0] == pytest.approx(np.array([[0.5, 0.5]]))


def test_heads_decide_level_by_level_and_parents_sum_their_children() -> None:
    rng = np.random.default_rng(1)
    levels = [rng.dirichlet(np.ones(k), 30) for k in DEEP.num_classes]
    shares = [level[0] for level in all_levels(DEEP, balanced_prior(DEEP)[None])]
    p = leaf_probabilities(DEEP, levels, shares, heads=True)
    coarse, middle, leaf = all_levels(DEEP, p)
    assert coarse == pytest.approx(levels[0])
    assert leaf.sum(axis=1) == pytest.approx(np.ones(30))
    # within tumour the middle head decides, within malignant the leaf head
    assert middle[:, 1] / middle[:, 2] == pytest.approx(levels[1][:, 1] / levels[1][:, 2])
    assert leaf[:, 3] / leaf[:, 4] == pytest.approx(levels[2][:, 3] / levels[2][:, 4])


def test_the_answer_is_one_path_and_what_is_likelier_elsewhere_is_named() -> None:
    p = np.array([[0.4, 0.14, 0.13, 0.12, 0.11, 0.1], [0.6, 0.08, 0.08, 0.08, 0.08, 0.08]])
    path = decide(ONE_AND_FIVE, p)
    assert path.nodes.tolist() == [[1, 0], [1, 0]]
    assert path.masses == pytest.approx(np.array([[0.6, 0.6], [0.14, 0.6]]))
    assert likelier_elsewhere(ONE_AND_FIVE, p) == [["neg"], []]
    chain = LabelTree.from_nested({"a": {"x": ["n"]}, "b": {"y": ["c", "d"], "z": ["e"]}})
    assert likelier_elsewhere(chain, np.array([[0.45, 0.2, 0.15, 0.2]])) == [["n"]]


@pytest.mark.parametrize("tree", [ONE_AND_FIVE, DEEP])
def test_paths_are_paths(tree: LabelTree) -> None:
    p = np.random.default_rng(2).dirichlet(np.ones(len(tree.leaves)), 500)
    path = decide(tree, p)
    assert (tree.ancestors()[:, path.nodes[-1]] == path.nodes).all()
    assert (np.diff(path.masses, axis=0) <= 1e-12).all()
    assert (path.nodes[0] == all_levels(tree, p)[0].argmax(axis=1)).all()
