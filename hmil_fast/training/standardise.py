"""Detect features whose columns differ by orders of magnitude, and fit their standardisation."""

from collections.abc import Sequence

import numpy as np
import torch

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.models.feature_scale import FeatureScale

WIDE_RATIO = 100.0  # columns of pathology encoders differ by 10 to 20, areas and ratios by 10,000
_MOST_BAGS, _MOST_ROWS = 512, 512  # enough for means; a pass over all could take minutes
_CONSTANT = 1e-6  # of the column's size: rounding


def fit_scale(cache: FeatureCache, bags: Sequence[int]) -> tuple[FeatureScale, float]:
    """Fit means and deviations of the columns on some bags, and measure how their sizes differ.

    It reads at most 512 instances of at most 512 bags, evenly spaced.

    Args:
        cache: Features.
        bags: The training bags, by place in the cache.

    Returns:
        The scale, on the CPU, and the larger of two ratios of the columns' root mean squares: the
        largest to the median, and the 90th to the 10th percentile. 1 where there are none.
    """
    filled = [i for i in bags if cache.lengths[i]]
    count = 0
    shift: torch.Tensor | None = None  # sums of squares are exact enough around a typical row
    sums = torch.zeros(3, cache.dim, dtype=torch.float64)
    for i in _evenly(filled, _MOST_BAGS):
        x = cache.bag(i)
        x = x[_evenly(range(len(x)), _MOST_ROWS)].double().cpu()
        shift = x.mean(0) if shift is None else shift
        around = x - shift
        sums += torch.stack([around.sum(0), around.square().sum(0), x.square().sum(0)])
        count += len(x)
    scale = FeatureScale(cache.dim)
    if shift is None:
        return scale, 1.0
    first, second, square = sums / count
    size = square.sqrt()
    deviation = (second - first.square()).clamp_min(0).sqrt()
    scale.mean.copy_(shift + first)
    varies = deviation > _CONSTANT * size
    scale.factor.copy_(torch.where(varies, 1 / deviation, 0.0))
    return scale, _ratio(size)


def column_ratio(x: torch.Tensor) -> float:
    """Return the ratio of the sizes of the columns of [n, D], as `fit_scale` does."""
    return _ratio(x.double().square().mean(0).sqrt())


def _ratio(sizes: torch.Tensor) -> float:
    seen = sizes[sizes > 0].numpy()
    if not len(seen):
        return 1.0
    low, middle, high = np.quantile(seen, [0.1, 0.5, 0.9])
    return float(max(seen.max() / middle, high / low))


def _evenly(items: Sequence[int], most: int) -> list[int]:
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]
