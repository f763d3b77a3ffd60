"""A slide's attention per node of the label tree, and the tiles that get most of it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.io.store import FeatureStore
from hmil_fast.labels import LabelTree
from hmil_fast.training.predict import slide_attention
from hmil_fast.training.run_folder import Prediction, Run


class NodeMap(NamedTuple):
    """The attention paid for the sake of one node.

    Attributes:
        level: Level of the node.
        node: Index of the node on its level; None where one map serves all nodes.
        weights: float64 [num_tiles], summing to 1; NaN for a tile that is in no bag.
    """

    level: int
    node: int | None
    weights: NDArray[np.float64]


def slide_maps(run: Run, store: FeatureStore, slide_id: str) -> tuple[Prediction, list[NodeMap]]:
    """A slide's prediction and the attention maps of that very forward, in the tree's order.

    A model of a single map, or with attention on the finest level only, gives just those; a model
    without attention gives none.

    Raises:
        StoreError: The slide is not in the store.
    """
    cache = FeatureCache(store, [slide_id], run.path)
    prediction, attention = slide_attention(run, cache, slide_id)
    good = cache.good_tiles(0)
    num_tiles = store.record(slide_id).num_tiles
    # fewer entries than levels are those of the finest levels
    first = run.tree.num_levels - len(attention)
    maps = []
    for level, columns in enumerate(attention, start=first):
        own = columns.shape[1] == run.tree.num_classes[level]
        for k in range(columns.shape[1]):
            weights = np.full(num_tiles, np.nan)
            weights[slice(None) if good is None else good] = columns[:, k]
            maps.append(NodeMap(level, k if own else None, weights))
    if len(maps) > 1 and all(_equal(m.weights, maps[0].weights) for m in maps):
        maps = [NodeMap(run.tree.num_levels - 1, None, maps[0].weights)]
    return prediction, maps


def _equal(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    return bool(np.allclose(a, b, rtol=1e-9, atol=0, equal_nan=True))


def node_name(tree: LabelTree, level: int, node: int | None) -> str:
    """The name of a map's node, with its level where the name alone is not enough."""
    if node is None:
        return "attention"
    name = tree.names[level][node]
    twice = sum(name in names for names in tree.names) > 1
    return f"{name} (level {level})" if twice else name


def top_tiles(weights: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    """The at most k tiles of the highest attention, highest first; of equals the earlier."""
    order = np.argsort(np.where(np.isfinite(weights), -weights, np.inf), kind="stable")
    return order[: min(k, int(np.isfinite(weights).sum()))]
