"""Percentile intervals from resampled patients."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hmil_fast.metrics.flat import Floats

_BLOCK = 2_000_000  # weights held at once


class Interval(NamedTuple):
    """A percentile interval; `low` and `high` are None when no draw defined the metric."""

    low: float | None
    high: float | None
    undefined: int  # draws left out because they leave the metric undefined


def bootstrap(
    fn: Callable[[Floats], Mapping[str, Floats]],
    groups: Sequence[str],
    n: int = 1000,
    seed: int = 0,
    coverage: float = 0.95,
) -> dict[str, Interval]:
    """Percentile intervals of metrics, by drawing whole patients with replacement.

    Slides of one patient are not independent, so patients are drawn, not slides (cluster
    bootstrap, Davison and Hinkley 1997). A draw in which a metric is undefined is left out of that
    metric's interval and counted.

    Args:
        fn: Metrics for draws at once: weights float64 [draws, slides], how often each slide was
            drawn, to float [draws] per metric, NaN where undefined.
        groups: Patient of each slide.
        n: Number of draws.
        seed: Seed; equal arguments give equal intervals.
        coverage: Share of the draws inside.

    Returns:
        An interval per metric; empty with fewer than two patients, where nothing can be resampled.
    """
    _, patient = np.unique(np.asarray(groups, dtype=np.str_), return_inverse=True)
    patients = int(patient.max()) + 1 if len(patient) else 0
    if patients < 2 or n < 1:
        return {}
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(patients, np.full(patients, 1 / patients), size=n)
    block = max(1, _BLOCK // len(patient))
    parts = [fn(counts[i : i + block, patient].astype(np.float64)) for i in range(0, n, block)]
    return {
        name: _interval(np.concatenate([p[name] for p in parts]), coverage) for name in parts[0]
    }


def _interval(values: Floats, coverage: float) -> Interval:
    defined = values[np.isfinite(values)]
    if not len(defined):
        return Interval(None, None, len(values))
    low, high = np.quantile(defined, [(1 - coverage) / 2, (1 + coverage) / 2])
    return Interval(float(low), float(high), len(values) - len(defined))
