"""Compute a slide's attention per node of the label tree, and its top tiles."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.config import Runtime
from hmil_fast.evaluation.predict import slide_attention
from hmil_fast.io.store import FeatureStore
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import decide
from hmil_fast.runs.predictions import Prediction
from hmil_fast.runs.run import Run


class NodeMap(NamedTuple):
    """The attention map of one node.

    Attributes:
        level: Level of the node.
        node: Index of the node on its level; None where one map serves all nodes.
        weights: float64 [num_tiles], summing to 1; NaN for a tile that is in no bag.
    """

    level: int
    node: int | None
    weights: NDArray[np.float64]


def slide_maps(
    run: Run, store: FeatureStore, slide_id: str, runtime: Runtime = Runtime()
) -> tuple[Prediction, list[NodeMap]]:
    """A slide's prediction and the attention maps of that very forward, see `node_maps`.

    Raises:
        StoreError: The slide is not in the store.
    """
    cache = FeatureCache(store, [slide_id], run.path)
    prediction, attention = slide_attention(run, cache, slide_id, runtime)
    good = cache.good_tiles(0)
    num_tiles = store.record(slide_id).num_tiles
    maps = []
    for m in node_maps(run.tree, attention, prediction.probabilities[-1], sums=run.sums):
        weights = np.full(num_tiles, np.nan)
        weights[slice(None) if good is None else good] = m.weights
        maps.append(m._replace(weights=weights))
    return prediction, maps


def node_maps(
    tree: LabelTree,
    attention: Sequence[NDArray[np.float64]],
    p_leaf: NDArray[np.float64],
    *,
    sums: bool,
) -> list[NodeMap]:
    """One map per distinct node of the tree, that of the attention which its answer comes from.

    A leaf has its own attention. An inner node whose evidence is that of its leaves has their
    mean, Σ p(leaf | node) · a_leaf; one with a head of its own has the attention of that head.

    Args:
        tree: The label tree.
        attention: Per level float [n, K_l], or of the finest levels only, or one column for all
            nodes; empty for a model without attention.
        p_leaf: Leaf probabilities of the slide, float [K].
        sums: Whether the evidence for an inner node is that of its leaves.

    Returns:
        The maps in the order of `LabelTree.nodes`, of n weights each; a single one where one map
        serves all nodes, none without attention.
    """
    if not attention:
        return []
    leaves = attention[-1]
    if leaves.shape[1] != len(tree.leaves):
        return [NodeMap(tree.num_levels - 1, None, leaves[:, 0])]
    first = tree.num_levels - len(attention)  # fewer entries than levels are those of the finest
    up = tree.ancestors()
    maps = []
    for level, node in tree.nodes:
        if sums or level < first:
            below = up[level] == node
            # no division by 0 where p is 0 for all leaves below
            p = np.maximum(p_leaf[below], np.finfo(np.float64).tiny)
            weights = leaves[:, below] @ (p / p.sum())
        else:
            weights = attention[level - first][:, node]
        maps.append(NodeMap(level, node, weights))
    if len(maps) > 1 and all(_equal(m.weights, maps[0].weights) for m in maps):
        maps = [NodeMap(tree.num_levels - 1, None, maps[0].weights)]
    return maps


def _equal(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    return bool(np.allclose(a, b, rtol=1e-9, atol=0, equal_nan=True))


def likeliest_first(tree: LabelTree, prediction: Prediction, maps: Sequence[NodeMap]) -> list[int]:
    """Places of the maps: the answer's nodes, leaf first, then the others by probability."""
    path = answer_nodes(tree, prediction)

    def key(place: int) -> tuple[bool, float]:
        m = maps[place]
        if m.node is None:
            return False, -np.inf
        on = (m.level, m.node) in path
        return not on, -m.level if on else -prediction.probabilities[m.level][m.node]

    return sorted(range(len(maps)), key=key)


def answer_nodes(tree: LabelTree, prediction: Prediction) -> set[tuple[int, int]]:
    """The distinct nodes from the root to the leaf that the run answers."""
    path = decide(tree, prediction.probabilities[-1][None]).nodes[:, 0]
    return {tree.node(level, int(k)) for level, k in enumerate(path)}


def top_tiles(weights: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    """The at most k tiles of the highest attention, highest first; of equals the earlier."""
    order = np.argsort(np.where(np.isfinite(weights), -weights, np.inf), kind="stable")
    return order[: min(k, int(np.isfinite(weights).sum()))]
