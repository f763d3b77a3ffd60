"""Conformal answers: the coverage that was asked for, against plain loops over the tree."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from hmil_fast.labels import LabelTree
from hmil_fast.metrics import decide
from hmil_fast.metrics.conformal import (
    answer_nodes,
    aps_scores,
    aps_sets,
    conformal_answers,
    join_answers,
    lac_scores,
    lac_sets,
    node_contains,
    node_depth,
    node_scores,
    slides_needed,
    threshold,
)

TREE = LabelTree.from_nested(
    {"normal": None, "tumour": {"benign": ["b1", "b2"], "malignant": ["low", "high"]}}
)


def sample(n: int, seed: int) -> tuple[NDArray, NDArray]:
    """Leaves, and probabilities of a model that is far too sure of itself."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 5, n)
    z = rng.normal(size=(n, 5)) + 1.2 * np.eye(5)[y]
    p = np.exp(3 * z)
    return y, p / p.sum(axis=1, keepdims=True)


def below(level: int, node: int) -> set[int]:
    if level < 0:
        return set(range(5))
    return {k for k in range(5) if TREE.ancestors()[level, k] == node}


def likeliest_way(p: NDArray) -> list[tuple[int, int, float]]:
    """(level, node, probability) from the root down, by sums over sets of leaves."""
    way, here = [], below(-1, 0)
    for level in range(TREE.num_levels):
        children = [k for k in range(TREE.num_classes[level]) if below(level, k) <= here]
        best = max(children, key=lambda k: sum(p[i] for i in below(level, k)))
        here = below(level, best)
        way.append((level, best, sum(p[i] for i in here)))
    return way


@pytest.mark.parametrize(
    ("n", "risk", "rank"),
    [(9, 0.1, 9), (8, 0.1, None), (19, 0.1, 18), (99, 0.05, 95), (0, 0.1, None)],
)
def test_the_finite_sample_quantile(n: int, risk: float, rank: int | None) -> None:
    scores = np.random.default_rng(0).permutation(n).astype(float)
    assert threshold(scores, risk) == (math.inf if rank is None else rank - 1)
    assert (n >= slides_needed(risk)) is (rank is not None)


def test_the_answered_node_is_the_deepest_above_the_threshold() -> None:
    y, p = sample(200, 0)
    for limit in (0.0, 0.3, 0.62, 0.97, math.inf):
        level, node = answer_nodes(TREE, p, limit)
        for i in range(200):
            sure = [(l, k) for l, k, mass in likeliest_way(p[i]) if mass > limit]
            assert (level[i], node[i]) == (sure[-1] if sure else (-1, 0))
        held = node_contains(TREE, level, node, y)
        assert held.tolist() == [y[i] in below(level[i], node[i]) for i in range(200)]
        # the score says exactly from which threshold on the answer is right
        assert ((node_scores(TREE, y, p) <= limit) == held).all()


def test_depth_counts_no_repeats() -> None:
    nodes = [("root", -1, 0), ("normal", 0, 0), ("normal", 2, 0), ("tumour", 0, 1), ("low", 2, 3)]
    depths = node_depth(TREE, np.array([l for _, l, _ in nodes]), np.array([k for *_, k in nodes]))
    assert TREE.names[2][3] == "low"
    assert depths.tolist() == [0, 1, 1, 1, 3]


def test_sets_by_hand() -> None:
    flat = LabelTree.from_nested(list("abcde"))
    p = np.array([[0.5, 0.3, 0.1, 0.06, 0.04]])
    assert lac_scores(np.array([1]), p) == pytest.approx([0.7])
    assert aps_scores(np.array([2]), p) == pytest.approx([0.9])
    assert np.flatnonzero(lac_sets(flat, p, 0.7 + 1e-9)[0]).tolist() == [0, 1]
    assert np.flatnonzero(aps_sets(flat, p, 0.9 + 1e-9)[0]).tolist() == [0, 1, 2]
    assert np.flatnonzero(lac_sets(flat, p, 0.1)[0]).tolist() == [0]  # never empty
    assert np.flatnonzero(aps_sets(flat, p, 0.1)[0]).tolist() == [0]
    assert lac_sets(flat, p, math.inf).all()


def test_a_set_holds_the_decided_leaf() -> None:
    """Even where a leaf off the path is likelier."""
    tree = LabelTree.from_nested({"a": ["a"], "b": ["c", "d", "e"]})
    p = np.array([[0.4, 0.3, 0.2, 0.1]])
    assert decide(tree, p).nodes[:, 0].tolist() == [1, 1]
    assert np.flatnonzero(lac_sets(tree, p, 0.6)[0]).tolist() == [0, 1]
    assert np.flatnonzero(aps_sets(tree, p, 0.1)[0]).tolist() == [1]


@pytest.mark.parametrize("risk", [0.05, 0.1, 0.3])
def test_coverage_is_what_was_asked(risk: float) -> None:
    right = {"node": [], "lac": [], "aps": []}
    for seed in range(60):
        y, p = sample(330, 100 + seed)
        got = conformal_answers(TREE, (y[:30], p[:30]), p[30:], risk)
        rest = np.arange(300)
        right["node"].append(node_contains(TREE, got.level, got.node, y[30:]).mean())
        right["lac"].append(got.lac[rest, y[30:]].mean())
        right["aps"].append(got.aps[rest, y[30:]].mean())
    for name, shares in right.items():
        spread = np.std(shares) / np.sqrt(60)
        assert np.mean(shares) > 1 - risk - 2.5 * spread, name
        assert np.mean(shares) < 1 - risk + 0.1 + 2.5 * spread, name


def test_scores_that_tie_with_the_threshold_are_covered() -> None:
    """Slides that are all alike, wrong in the same way: the answer must still hold their leaf."""
    tree = LabelTree.from_nested(["a", "b"])
    p, y = np.tile([0.75, 0.25], (12, 1)), np.ones(12, dtype=np.int64)
    got = conformal_answers(tree, (y[:9], p[:9]), p[9:], 0.1)
    assert (got.level == -1).all()
    assert got.lac.all()
    assert got.aps.all()


def test_too_few_slides_answer_with_the_root() -> None:
    y, p = sample(30, 3)
    got = conformal_answers(TREE, (y[:8], p[:8]), p[8:], 0.1)
    assert (got.level == -1).all()
    assert got.lac.all()
    assert got.aps.all()
    joined = join_answers([got, conformal_answers(TREE, (y, p), p, 0.1)])
    assert (len(joined.level), joined.lac.shape) == (52, (52, 5))
    assert (joined.level[22:] > -1).any()
