"""Which map a node of the tree has."""

import numpy as np
import pytest
from numpy.typing import NDArray

from hmil_fast.labels import LabelTree
from hmil_fast.report.attention import NodeMap, node_maps

TREE = LabelTree.from_nested({"neg": ["neg"], "low": {"grade": ["a"]}, "pos": {"big": ["b", "c"]}})
P = np.array([0.1, 0.2, 0.1, 0.6])


def drawn(n: int, *columns: int) -> list[NDArray[np.float64]]:
    rng = np.random.default_rng(0)
    return [rng.dirichlet(np.ones(n), size=k).T for k in columns]


def by_title(maps: list[NodeMap]) -> dict[str, NDArray[np.float64]]:
    return {TREE.title(m.level, m.node): m.weights for m in maps if m.node is not None}


def test_a_chain_has_its_leaf_s_attention_and_an_inner_node_that_of_its_leaves() -> None:
    attention = drawn(20, 3, 3, 4)
    maps = by_title(node_maps(TREE, attention, P, sums=True))
    assert list(maps) == ["neg", "low > grade > a", "pos > big", "b", "c"]
    for title, leaf in {"neg": 0, "low > grade > a": 1, "b": 2, "c": 3}.items():
        np.testing.assert_allclose(maps[title], attention[2][:, leaf])
    inner = (attention[2][:, 2] + 6 * attention[2][:, 3]) / 7
    np.testing.assert_allclose(maps["pos > big"], inner)
    assert maps["pos > big"].sum() == pytest.approx(1)


def test_a_node_with_a_head_has_the_attention_of_the_head() -> None:
    attention = drawn(20, 3, 3, 4)
    maps = by_title(node_maps(TREE, attention, P, sums=False))
    np.testing.assert_allclose(maps["pos > big"], attention[1][:, 2])
    np.testing.assert_allclose(maps["neg"], attention[2][:, 0])
    # attention on the finest level only
    alone = by_title(node_maps(TREE, attention[2:], P, sums=False))
    np.testing.assert_allclose(
        alone["pos > big"], by_title(node_maps(TREE, attention, P, sums=True))["pos > big"]
    )


def test_one_map_for_all_nodes_no_map_and_leaves_that_the_prior_excludes() -> None:
    assert node_maps(TREE, [], P, sums=True) == []
    (shared,) = drawn(20, 1)
    for attention in ([shared], [np.repeat(shared, 4, axis=1)]):
        (only,) = node_maps(TREE, attention, P, sums=True)
        assert only.node is None
        np.testing.assert_allclose(only.weights, shared[:, 0])
    (leaves,) = drawn(20, 4)
    maps = by_title(node_maps(TREE, [leaves], np.array([1.0, 0, 0, 0]), sums=True))
    np.testing.assert_allclose(maps["pos > big"], leaves[:, 2:].mean(1))
