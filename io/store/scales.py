"""Present one scale of a store of several, or all of them joined, as a store."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import UsageError
from hmil_fast.io.store.reader import AttemptReader
from hmil_fast.io.store.store import FeatureStore
from hmil_fast.io.store.store_view import StorePart

_SAME_MPP = 0.01


def at_scale(store: FeatureStore, mpp: float | None = None) -> FeatureStore:
    """A store's slides at one scale: their features, coordinates, facts and digests are of it.

    Nothing is copied: each scale lies in arrays of its own.

    Args:
        store: A store of one scale, which comes back as it is, or of several.
        mpp: µm per px asked for at extraction; the finest scale by default.

    Raises:
        UsageError: The store has no scale within 1 % of that.
    """
    scales = store.spec.scales
    scale = 0
    if mpp is not None:
        # imported features may not say their mpp
        near = [i for i, m in enumerate(scales) if m and abs(float(m) / mpp - 1) <= _SAME_MPP]
        if not near:
            there = " and ".join("unknown" if m is None else f"{m:g}" for m in scales)
            raise UsageError(
                f"the store {store.path} has no features at {mpp:g} µm per px, its scale is {there}"
                if len(scales) == 1
                else f"the store {store.path} has no features at {mpp:g} µm per px, its scales are "
                f"{there}",
                "choose one that is there, or extract into a new --store with this --mpp",
            )
        scale = near[0]
    return store if len(scales) == 1 else _Scale(store, scale)


class _Scale(StorePart):
    """A store of several scales, seen at one."""

    def __init__(self, whole: FeatureStore, scale: int) -> None:
        super().__init__(whole, whole.spec.at(scale))
        self._scale = scale

    def of(self, whole: FeatureStore) -> FeatureStore:
        return _Scale(whole, self._scale)

    def _part(self, whole: AttemptReader) -> AttemptReader:
        prefix = "" if not self._scale else whole.record.scales[self._scale - 1].prefix
        return AttemptReader(whole.folder, whole.record.at(self._scale), prefix, whole.view)


def join_scales(store: FeatureStore) -> FeatureStore:
    """A store's finest tiles, each with the features of the tiles that it lies in behind its own.

    So a vector has D values a scale, as in the multiscale bags of DSMIL (Li et al., CVPR 2021). A
    tile is bad where one of these is. A store that is joined already comes back as it is.

    Raises:
        UsageError: The store has one scale.
    """
    if isinstance(store, _Joined):
        return store
    if len(store.spec.scales) == 1:
        raise UsageError(
            f"the store {store.path} has one scale, there is nothing to join",
            "leave out scales=all, or extract into a new --store with several --mpp",
        )
    return _Joined(store)


class _Joined(StorePart):
    """A store of several scales, all at once; read in rows, since parents lie anywhere."""

    def __init__(self, whole: FeatureStore) -> None:
        count = len(whole.spec.scales)
        super().__init__(whole, replace(whole.spec, dim=whole.spec.dim * count))
        self._scales = [_Scale(whole, scale) for scale in range(count)]

    def of(self, whole: FeatureStore) -> FeatureStore:
        return _Joined(whole)

    def _part(self, whole: AttemptReader) -> AttemptReader:
        return AttemptReader(whole.folder, whole.record.at(0), view=whole.view)

    def _rows(self, slide_id: str, start: int, stop: int) -> list[npt.NDArray[np.int64]]:
        """Per scale the row of each tile, or of the tile it lies in."""
        rows = [np.arange(start, stop)]
        for fine, coarse in pairwise(self._scales):
            parent = fine.parent(slide_id)[rows[-1]].astype(np.int64)
            if ((parent < 0) | (parent >= coarse.record(slide_id).num_tiles)).any():
                raise self._reader(slide_id).damaged("a tile lies in one that does not exist")
            rows.append(parent)
        return rows

    def status(self, slide_id: str) -> npt.NDArray[np.uint8]:
        rows = self._rows(slide_id, 0, self.record(slide_id).num_tiles)
        status = np.zeros(len(rows[0]), np.uint8)
        for scale, at in zip(self._scales, rows, strict=True):
            np.maximum(status, scale.status(slide_id)[at], out=status)
        return status

    def read_rows(self, slide_id: str, start: int, stop: int) -> npt.NDArray[Any]:
        parts = []
        for scale, rows in zip(self._scales, self._rows(slide_id, start, stop), strict=True):
            first, last = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
            parts.append(scale.read_rows(slide_id, first, last)[rows - first])
        return np.concatenate(parts, axis=1)

    def _work(self, slide_id: str, out: npt.NDArray[Any]) -> Iterator[Callable[[], None]]:
        def work() -> None:
            out[...] = self.read_rows(slide_id, 0, len(out))

        yield work
