"""Bags of features, all in memory and packed into batches without padding."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hmil_fast.io.store import FeatureStore


class FeatureCache:
    """The features of a run's slides, read once from the store.

    They lie in memory if they take less than half of what is free, else in a scratch file that is
    mapped. Tiles that could not be decoded belong to no bag.

    Args:
        store: Where the features are.
        slide_ids: Slides, in the order of their bags.
        scratch: Folder for the scratch file, should one be needed; it is unlinked at once.
        in_memory: The most bytes of features to keep in memory; by default half of what is free.

    Attributes:
        lengths: Instances per bag, int64 [B].
    """

    def __init__(
        self,
        store: FeatureStore,
        slide_ids: Sequence[str],
        scratch: Path,
        in_memory: int | None = None,
    ) -> None:
        self.slide_ids = list(slide_ids)
        self.dim = store.spec.dim
        rows = sum(store.record(slide_id).num_tiles for slide_id in self.slide_ids)
        limit = _free_memory() // 2 if in_memory is None else in_memory
        self._features = _allocate((rows, self.dim), store.spec.stored_dtype, scratch, limit)
        _, bags = store.read_packed(self.slide_ids, out=self._features)
        self._bags = bags
        self._good: dict[int, NDArray[np.intp]] = {}
        self.lengths = bags[:, 1].copy()
        for i, slide_id in enumerate(self.slide_ids):
            status = store.status(slide_id)
            if status.any():
                self._good[i] = np.flatnonzero(status == 0)
                self.lengths[i] = len(self._good[i])

    def bag(self, index: int) -> Tensor:
        """One bag's features [n, D] in the store's dtype, without a copy where no tile is bad."""
        start, length = self._bags[index]
        rows = self._features[start : start + length]
        if index in self._good:
            rows = rows[self._good[index]]
        x = torch.from_numpy(rows)
        return x.view(torch.bfloat16) if x.dtype == torch.uint16 else x

    def good_tiles(self, index: int) -> NDArray[np.intp] | None:
        """Which tiles of the slide are in its bag, or None for all."""
        return self._good.get(index)

    def batch(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Pack bags one behind the other.

        Returns:
            Features float32 [N, D] and bags int64 [B, 2] of (start, length), on the device.
        """
        lengths = torch.from_numpy(self.lengths[list(indices)])
        starts = torch.cumsum(lengths, 0) - lengths
        x = torch.empty((int(lengths.sum()), self.dim), pin_memory=device.type == "cuda")
        for index, start, length in zip(indices, starts.tolist(), lengths.tolist(), strict=True):
            x[start : start + length] = self.bag(index)
        bags = torch.stack([starts, lengths], 1)
        return x.to(device, non_blocking=True), bags.to(device, non_blocking=True)


def epoch_batches(
    lengths: NDArray[np.int64], max_bags: int, max_instances: int, seed: Sequence[int] | None
) -> list[list[int]]:
    """Positions of bags, grouped into batches within both budgets.

    Args:
        lengths: Instances per bag, int64 [B].
        max_bags: The most bags in a batch.
        max_instances: The most instances in a batch; a larger bag goes alone.
        seed: Shuffles the bags, the same way for the same numbers; None keeps their order.
    """
    count = len(lengths)
    order = range(count) if seed is None else np.random.default_rng(seed).permutation(count)
    batches: list[list[int]] = []
    used = 0
    for i in order:
        length = int(lengths[i])
        if not batches or len(batches[-1]) == max_bags or used + length > max_instances:
            batches.append([])
            used = 0
        batches[-1].append(int(i))
        used += length
    return batches


def _allocate(
    shape: tuple[int, int], dtype: np.dtype[Any], scratch: Path, limit: int
) -> NDArray[Any]:
    if shape[0] * shape[1] * dtype.itemsize <= limit:
        return np.empty(shape, dtype)
    with TemporaryFile(dir=scratch) as file:
        return np.memmap(file, dtype, "w+", shape=shape)


def _free_memory() -> int:
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**33
