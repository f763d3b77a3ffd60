"""Find slides that are in the cohort twice, by equal or nearly equal features."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hmil_fast.io.store import FeatureStore

_NEAR = 0.045  # of the distance to the cohort's mean: a centred cosine of 0.999
_BLOCK = 1024


def same_features(store: FeatureStore, slide_ids: Sequence[str]) -> list[tuple[str, str]]:
    """Find pairs of slides whose features, coordinates and statuses are equal bit for bit.

    It reads commit records only. Slides without tiles are left out: all of them are equal.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for slide_id in slide_ids:
        record = store.record(slide_id)
        if record.num_tiles:
            alike[record.content_digest].append(slide_id)
    return [pair for group in alike.values() for pair in combinations(group, 2)]


def near_duplicates(means: NDArray[np.floating], slide_ids: Sequence[str]) -> list[tuple[str, str]]:
    """Find pairs of slides whose mean features, minus the cohort's mean, are almost equal.

    The cohort's mean is subtracted because raw means of one encoder are similar for all slides.

    Args:
        means: Mean feature of each slide, [n, D].
        slide_ids: Slides, [n].
    """
    x = np.asarray(means, dtype=np.float64)
    x = x - x.mean(axis=0)
    size = np.square(x).sum(axis=1)
    pairs = []
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        squared = size[rows, None] + size[None, :] - 2 * x[rows] @ x.T
        least = np.minimum(size[rows, None], size[None, :])
        for i, j in np.argwhere((squared < _NEAR**2 * least) & (least > 0)):
            if start + i < j:
                pairs.append((slide_ids[start + i], slide_ids[j]))
    return pairs
