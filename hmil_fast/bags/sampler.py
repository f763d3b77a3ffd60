"""Which bags make a step: batches within budgets, in an order that is known beforehand.

The order is a function of a few numbers (seed, fold, epoch), so a position in it is a number too.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_VIEWS = 86  # sets the stream of views apart: a seed's trailing zeros would count for nothing


def epoch_batches(
    lengths: NDArray[np.int64],
    max_bags: int,
    max_instances: int,
    seed: Sequence[int] | None,
    leaves: NDArray[np.int64] | None = None,
) -> list[list[int]]:
    """Positions of bags, grouped into batches within both budgets.

    Args:
        lengths: Instances per bag, int64 [B].
        max_bags: The most bags in a batch.
        max_instances: The most instances in a batch; a larger bag goes alone.
        seed: Shuffles the bags, the same way for the same numbers; None keeps their order.
        leaves: Leaf of each bag, int64 [B], to draw every leaf that occurs as often as any other;
            about B bags in all, those of rare leaves several times.
    """
    if seed is None:
        order = np.arange(len(lengths))
    elif leaves is None or not len(leaves):
        order = np.random.default_rng(seed).permutation(len(lengths))
    else:
        order = _balanced(leaves, np.random.default_rng(seed))
    batches: list[list[int]] = []
    used = 0
    for i in order.tolist():
        length = int(lengths[i])
        if not batches or len(batches[-1]) == max_bags or used + length > max_instances:
            batches.append([])
            used = 0
        batches[-1].append(i)
        used += length
    return batches


def draw_views(
    batches: Sequence[Sequence[int]], views: int, seed: Sequence[int]
) -> list[NDArray[np.int64]]:
    """The view that each bag of each batch is seen in: 0 as it is, else 1 to `views`.

    Args:
        batches: Of a whole epoch.
        views: How many there are beside the plain one.
        seed: The same numbers draw the same views; another stream than the order's.
    """
    sizes = [len(batch) for batch in batches]
    drawn = np.random.default_rng((*seed, _VIEWS)).integers(1 + views, size=sum(sizes))
    return np.split(drawn, np.cumsum(sizes)[:-1])


def _balanced(leaves: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.intp]:
    """Rounds of one bag of every leaf; a bag comes again when all of its leaf have come."""
    members = [np.flatnonzero(leaves == leaf) for leaf in np.unique(leaves)]
    rounds = -(-len(leaves) // len(members))
    drawn = [
        np.concatenate([rng.permutation(own) for _ in range(-(-rounds // len(own)))])[:rounds]
        for own in members
    ]
    return rng.permuted(np.stack(drawn, 1), axis=1).ravel()


def split_batch(lengths: NDArray[np.int64], parts: int) -> list[list[int]]:
    """Positions of a batch's bags, dealt to ranks so that each has about as many instances.

    The largest first, each to the rank that has the fewest; a rank may get none. Within a rank
    they keep their order.
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    for i in np.argsort(-lengths, kind="stable").tolist():
        least = min(range(parts), key=lambda rank: (load[rank], len(dealt[rank])))
        dealt[least].append(i)
        load[least] += int(lengths[i])
    return [sorted(part) for part in dealt]
