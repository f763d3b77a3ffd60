"""Intervals over seeds and bags, and paired tests between methods."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.accuracy.fit import Probabilities
from bench.accuracy.sources import Ints
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import decide
from hmil_fast.metrics.flat import weighted_flat_metrics
from hmil_fast.metrics.tree import weighted_tree_metrics

METRICS = ("balanced_accuracy", "hierarchical_f1", "auc", "accuracy")
Draws = NDArray[np.float64]


class Run(NamedTuple):
    """What one method said of the tested bags of one seed.

    Attributes:
        y: True leaves [n].
        p: Leaf probabilities [n, leaves].
        seconds: CPU time that it took.
        tiles: `bench.accuracy.tiles.tile_aucs`, empty where there are none.
    """

    y: Ints
    p: Probabilities
    seconds: float = 0.0
    tiles: Mapping[str, float] = MappingProxyType({})


def resample(
    tree: LabelTree, runs: Mapping[str, list[Run]], redrawn: bool, draws: int, seed: int = 0
) -> dict[str, dict[str, Draws]]:
    """Metrics of every method under the same draws of seeds and bags.

    A draw takes seeds with replacement and, inside each, bags with replacement; its value is the
    mean over the seeds taken. Where the seeds split one set of bags, all seeds get the same bags.
    All methods see the same draws, so differences are paired.

    Args:
        tree: The label tree.
        runs: Per method one `Run` per seed, in the same order of seeds and bags.
        redrawn: Whether each seed has bags of its own.
        draws: How many draws.
        seed: Of the draws.

    Returns:
        Per method and metric float [1 + draws]; the first is the value on the data as they are.
    """
    first = next(iter(runs.values()))
    rng = np.random.default_rng(seed)
    takes = rng.multinomial(len(first), np.full(len(first), 1 / len(first)), size=draws)
    takes = np.concatenate([np.ones((1, len(first))), takes])
    counts: list[Draws] = []
    for run in first:
        n = len(run.y)
        if redrawn or not counts:
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=draws)
            counts.append(np.concatenate([np.ones((1, n)), drawn]))
        else:
            counts.append(counts[0])
    found = {}
    for method, per_seed in runs.items():
        values = [
            _metrics(tree, run, weights) for run, weights in zip(per_seed, counts, strict=True)
        ]
        found[method] = {
            name: _mean(np.stack([v[name] for v in values], axis=1), takes) for name in METRICS
        }
    return found


def _metrics(tree: LabelTree, run: Run, weights: Draws) -> dict[str, Draws]:
    answers = decide(tree, run.p).nodes
    return {
        **weighted_flat_metrics(run.y, run.p, weights, predicted=answers[-1]),
        **weighted_tree_metrics(tree, run.y, answers, weights),
    }


def _mean(values: Draws, takes: Draws) -> Draws:
    """Mean over the seeds taken [draws], leaving out those where a metric is undefined."""
    takes = np.where(np.isfinite(values), takes, 0)
    return np.asarray((np.nan_to_num(values) * takes).sum(1) / np.maximum(takes.sum(1), 1e-12))


def interval(values: Draws) -> tuple[float, float, float]:
    """Value, and the ends of its 95 % interval."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return float(values[0]), float(low), float(high)


def paired_p(ours: Draws, theirs: Draws) -> float:
    """Two-sided bootstrap p of a difference of 0."""
    difference = (ours - theirs)[1:]
    n = len(difference)
    least = min((difference <= 0).sum(), (difference >= 0).sum())
    return float(min(1.0, 2 * (least + 1) / (n + 1)))
