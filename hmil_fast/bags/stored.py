"""StoredBag: read a bag from the store chunk by chunk instead of caching it."""

import numpy as np
import torch
from torch import Tensor

from hmil_fast.io.store import FeatureStore


class StoredBag:
    """The chunks of a slide's features, each read from the store when it is asked for.

    For `HMIL.forward_chunks`: ``len(bag)`` chunks, ``bag[k]`` a tensor [n, D] of the store's dtype.
    Tiles that could not be decoded are left out, as they are of every bag; n may be 0.

    Args:
        store: Where the features are.
        slide_id: A committed slide.
        rows: The most tiles in a chunk, rounded down to whole chunks of the file (at least one).
        rank: Take part `rank` of `ranks` parts of equal size that follow one another; by default
            the whole slide.
        ranks: The number of parts.

    Raises:
        StoreError: Not in the store, or damaged; also when a chunk is read.
    """

    def __init__(
        self, store: FeatureStore, slide_id: str, *, rows: int = 2048, rank: int = 0, ranks: int = 1
    ) -> None:
        if rows < 1 or not 0 <= rank < ranks:
            raise ValueError(
                f"rows is {rows}, rank {rank} of {ranks}; give rows ≥ 1 and 0 ≤ rank < ranks"
            )
        self._store, self._slide_id = store, slide_id
        self._good = store.status(slide_id) == 0
        chunk = store.chunk_rows(slide_id)
        self._step = max(rows // chunk, 1) * chunk
        starts = range(0, len(self._good), self._step)
        self._starts = starts[len(starts) * rank // ranks : len(starts) * (rank + 1) // ranks]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, k: int) -> Tensor:
        start = self._starts[k]
        good = self._good[start : start + self._step]
        rows = self._store.read_rows(self._slide_id, start, start + len(good))
        x = torch.from_numpy(rows if good.all() else rows[np.flatnonzero(good)])
        return x.view(torch.bfloat16) if x.dtype == torch.uint16 else x
