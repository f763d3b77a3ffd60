"""Group bags into batches within size limits, draw augmented views, split batches among ranks.

The order depends on (seed, fold, epoch) only, so a checkpoint stores a position as one number.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_VIEWS = 86  # a stream of its own for views; numpy ignores trailing zeros of a seed


def epoch_batches(
    lengths: NDArray[np.int64],
    max_bags: int,
    max_instances: int,
    seed: Sequence[int] | None,
    leaves: NDArray[np.int64] | None = None,
) -> list[list[int]]:
    """Group positions of bags into batches within both budgets.

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
    """Draw a view for each bag of each batch: 0 is the plain tiles, 1 to `views` are augmented.

    Args:
        batches: Of a whole epoch.
        views: How many there are beside the plain one.
        seed: The same numbers draw the same views; another stream than the order's.
    """
    sizes = [len(batch) for batch in batches]
    drawn = np.random.default_rng((*seed, _VIEWS)).integers(1 + views, size=sum(sizes))
    return np.split(drawn, np.cumsum(sizes)[:-1])


def _balanced(leaves: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.intp]:
    """Draw rounds of one bag per leaf; a bag repeats only after all bags of its leaf were drawn."""
    members = [np.flatnonzero(leaves == leaf) for leaf in np.unique(leaves)]
    rounds = -(-len(leaves) // len(members))
    drawn = [
        np.concatenate([rng.permutation(own) for _ in range(-(-rounds // len(own)))])[:rounds]
        for own in members
    ]
    return rng.permuted(np.stack(drawn, 1), axis=1).ravel()


def split_batch(lengths: NDArray[np.int64], parts: int) -> list[list[int]]:
    """Divide a batch's bags among ranks so that instances are balanced.

    The largest bag goes first, each to the rank with the fewest instances. A rank may get none.
    Within a rank the bags keep their order.
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    for i in np.argsort(-lengths, kind="stable").tolist():
        least = min(range(parts), key=lambda rank: (load[rank], len(dealt[rank])))
        dealt[least].append(i)
        load[least] += int(lengths[i])
    return [sorted(part) for part in dealt]
