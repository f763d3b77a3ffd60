"""How well the maps of attention find the tiles that a label is about."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from bench.accuracy.sources import Ints
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import decide
from hmil_fast.report.attention import node_maps

Floats = NDArray[np.float64]
ANSWER, OVER_ALL = "the answer", "the answer, over all slides"


def tile_aucs(
    tree: LabelTree,
    attention: Sequence[Floats],
    bags: Ints,
    tumour: NDArray[np.bool_],
    p_leaf: Floats,
    *,
    sums: bool,
) -> dict[str, float]:
    """AUC of tumour tiles against the others by their attention, per map that the viewer shows.

    Args:
        tree: The label tree.
        attention: Per level float [N, C_l] as of `node_maps`; empty for a model without attention.
        bags: (start, length) of each bag, int64 [B, 2].
        tumour: Whether an instance is tumour, bool [N].
        p_leaf: Leaf probabilities, float [B, leaves].
        sums: Whether the evidence for an inner node is that of its leaves.

    Returns:
        By title of the node, and for the map of the answered leaf, the mean over the bags that hold
        both kinds of tiles. For the latter also one AUC over the tiles of all bags, attention taken
        as times the even share. Empty without attention.
    """
    if not attention:
        return {}
    leaves = decide(tree, p_leaf).nodes[-1]
    found: dict[str, list[float]] = {}
    shares = np.zeros(len(tumour))
    for (start, length), p, leaf in zip(bags, p_leaf, leaves, strict=True):
        inside = slice(start, start + length)
        maps = node_maps(tree, [level[inside] for level in attention], p, sums=sums)
        answer = maps[0]
        titles = {}
        for m in maps:
            if m.node is not None:
                titles[tree.title(m.level, m.node)] = m.weights
                if (m.level, m.node) == (tree.num_levels - 1, leaf):
                    answer = m
        shares[inside] = answer.weights * length
        if tumour[inside].any() and not tumour[inside].all():
            for title, weights in {ANSWER: answer.weights, **titles}.items():
                found.setdefault(title, []).append(_auc(tumour[inside], weights))
    means = {title: float(np.mean(values)) for title, values in found.items()}
    return means | {OVER_ALL: _auc(tumour, shares)} if means else {}


def _auc(positive: NDArray[np.bool_], score: Floats) -> float:
    ranks, k = rankdata(score), int(positive.sum())
    return float((ranks[positive].sum() - k * (k + 1) / 2) / (k * (len(score) - k)))
