"""Tree metrics against sets of ancestors written out by name."""

from itertools import product

import numpy as np
import pytest

from hmil_fast.labels import LabelTree
from hmil_fast.metrics import all_levels, decide, tree_metrics

BRACS = LabelTree.from_nested(
    {"benign": ["N", "PB", "UDH"], "atypical": ["FEA", "ADH"], "malignant": ["DCIS", "IC"]}
)
UNEVEN = LabelTree.from_nested(
    {"normal": None, "tumour": {"benign": None, "malignant": ["low", "high"]}}
)
# nodes by name, without the root; "normal" and "benign" are repeated to the last level
UNEVEN_PATHS = {
    "normal": ["normal"],
    "benign": ["tumour", "benign"],
    "low": ["tumour", "malignant", "low"],
    "high": ["tumour", "malignant", "high"],
}
BRACS_PATHS = {
    **{leaf: ["benign", leaf] for leaf in ("N", "PB", "UDH")},
    **{leaf: ["atypical", leaf] for leaf in ("FEA", "ADH")},
    **{leaf: ["malignant", leaf] for leaf in ("DCIS", "IC")},
}


@pytest.mark.parametrize(("tree", "paths"), [(BRACS, BRACS_PATHS), (UNEVEN, UNEVEN_PATHS)])
def test_hierarchical_f1_counts_shared_ancestors(
    tree: LabelTree, paths: dict[str, list[str]]
) -> None:
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, len(tree.leaves), 50), rng.random((50, len(tree.leaves)))
    true = [set(paths[tree.leaves[i]]) for i in y]
    predicted = [set(paths[tree.leaves[i]]) for i in decide(tree, p).nodes[-1]]
    shared = sum(len(a & b) for a, b in zip(true, predicted, strict=True))
    precision = shared / sum(map(len, predicted))
    recall = shared / sum(map(len, true))
    got = tree_metrics(tree, y, p)
    assert got["hierarchical_precision"] == pytest.approx(precision)
    assert got["hierarchical_recall"] == pytest.approx(recall)
    assert got["hierarchical_f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_leaves_of_unlike_depth_part_precision_from_recall() -> None:
    high, benign = UNEVEN.leaf("high"), UNEVEN.leaf("benign")
    got = tree_metrics(UNEVEN, np.array([high]), np.eye(4)[[benign]])
    assert got["hierarchical_precision"] == pytest.approx(1 / 2)
    assert got["hierarchical_recall"] == pytest.approx(1 / 3)


def test_distances_of_all_and_of_mistakes() -> None:
    y = np.array([BRACS.leaf(n) for n in ("N", "N", "N", "IC")])
    predicted = [BRACS.leaf(n) for n in ("N", "PB", "IC", "IC")]
    got = tree_metrics(BRACS, y, np.eye(7)[predicted])
    assert got["mean_tree_distance"] == pytest.approx((0 + 2 + 4 + 0) / 4)
    assert got["mistake_severity"] == pytest.approx((2 + 4) / 2)


def test_repeats_of_a_leaf_add_no_distance() -> None:
    """Edges of the tree as it is written: the path up from one leaf and down to the other."""
    for true, predicted in product(UNEVEN_PATHS, repeat=2):
        edges = len(set(UNEVEN_PATHS[true]) ^ set(UNEVEN_PATHS[predicted]))
        y, p = np.array([UNEVEN.leaf(true)]), np.eye(4)[[UNEVEN.leaf(predicted)]]
        assert tree_metrics(UNEVEN, y, p)["mean_tree_distance"] == edges
        assert tree_metrics(UNEVEN, y, p).get("mistake_severity", 0) == edges


def test_no_mistake_has_no_severity_and_all_wrong_has_f1_zero() -> None:
    y = np.array([0, 6])
    assert "mistake_severity" not in tree_metrics(BRACS, y, np.eye(7)[y])
    wrong = tree_metrics(BRACS, y, np.eye(7)[[6, 0]])
    assert wrong["hierarchical_f1"] == 0
    assert tree_metrics(BRACS, np.zeros(0, int), np.zeros((0, 7))) == {}


DEEP = LabelTree.from_nested(
    {"normal": None, "tumour": {"benign": ["b1"], "malignant": ["low", "high"]}}
)


def test_sums_of_leaves_by_name() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(4), 20)
    leaf = {name: p[:, DEEP.leaf(name)] for name in DEEP.leaves}
    first, second, _ = all_levels(DEEP, p)
    want = {"normal": leaf["normal"], "tumour": leaf["b1"] + leaf["low"] + leaf["high"]}
    assert first == pytest.approx(np.stack([want[n] for n in DEEP.names[0]], 1))
    want = {"normal": leaf["normal"], "benign": leaf["b1"], "malignant": leaf["low"] + leaf["high"]}
    assert second == pytest.approx(np.stack([want[n] for n in DEEP.names[1]], 1))
    assert len(all_levels(LabelTree.from_nested(["a", "b"]), p[:, :2])) == 1


def test_a_head_is_held_against_the_answer() -> None:
    # N (benign) is the likeliest leaf, but benign has 0.4 and atypical 0.6: the answer is atypical
    split = [0.4, 0, 0, 0.3, 0.3, 0, 0]
    plain = [0, 0, 0, 0, 0, 0, 1.0]  # malignant
    head = np.eye(3)[[1, 0, 2, 2]]  # right, wrong, wrong, right
    leaves = np.array([split, split, split, plain])
    got = tree_metrics(BRACS, np.zeros(4, int), leaves, [head])
    assert got["head_against_answer_0"] == pytest.approx(2 / 4)
    assert "head_against_answer_0" not in tree_metrics(BRACS, np.zeros(4, int), leaves)
