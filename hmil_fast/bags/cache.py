"""Cache the features of a run's slides, and pack them into batches without padding."""

import os
import weakref
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hmil_fast.bags.cache_placement import choose_tier, gb
from hmil_fast.bags.stored import StoredBag
from hmil_fast.errors import UsageError
from hmil_fast.io.store import FeatureStore, at_view
from hmil_fast.io.store.backend import backend_of
from hmil_fast.kernels.gated_attention_pool.chunked import Chunks

_CPU = torch.device("cpu")
_AHEAD = 2  # batches that are made ready while one is worked on
_Made = tuple[Tensor | Chunks, Tensor, torch.cuda.Event | None]


class FeatureCache:
    """The features of a run's slides, in the dtype of the store.

    All tiers but ``stream`` read every slide once; folds share one cache. Tiles that could not be
    decoded belong to no bag and are not kept, so that every bag is one slice. Bags that follow one
    another in `slide_ids` make a batch without a copy.

    Args:
        store: Where the features are.
        slide_ids: Slides, in the order of their bags.
        scratch: Folder for the scratch file of the tier ``map``; it is unlinked at once.
        tier: One of `config.CACHES`.
        device: Where the batches will be asked for.
        views: Augmented views of the store that are kept too, from 1 to this.

    Attributes:
        lengths: Instances per bag, int64 [S · (1 + views)]: bag v · S + i is slide i of S in view
            v, and the first S bags are the tiles as they are.
        tier: Where the features lie.
        bytes: Of all features.

    Raises:
        UsageError: No such tier or view, or no room for the scratch file.
        StoreError: A slide is missing or damaged.
    """

    def __init__(
        self,
        store: FeatureStore,
        slide_ids: Sequence[str],
        scratch: Path,
        tier: str = "auto",
        device: torch.device = _CPU,
        views: int = 0,
    ) -> None:
        self.slide_ids = list(slide_ids)
        self.views = views
        self.dim = store.spec.dim
        self._stores = [at_view(store, view) for view in range(1 + views)]
        self._dtype: torch.dtype = getattr(torch, store.spec.dtype)
        self._good: dict[int, NDArray[np.intp]] = {}
        records = backend_of(store.path).map(store.record, self.slide_ids)
        self._tiles = [record.num_tiles for record in records]
        self.lengths = np.array(self._tiles, np.int64)
        for i, status in enumerate(backend_of(store.path).map(store.status, self.slide_ids)):
            if status.any():
                self._good[i] = np.flatnonzero(status == 0)
                self.lengths[i] = len(self._good[i])
        self.lengths = np.tile(self.lengths, 1 + views)
        self._starts = np.cumsum(self.lengths) - self.lengths
        self.bytes = int(self.lengths.sum()) * self.dim * self._dtype.itemsize
        self.tier = choose_tier(tier, self.bytes, device, scratch)
        self._rows = None
        if self.tier.name != "stream":
            self._rows = self._allocate(device, scratch)
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(self._load, range(len(self.lengths))))

    def describe(self) -> str:
        """Say in one line how many features are cached, where and why."""
        places = {
            "device": "in the memory of the device",
            "host": "in pinned main memory"
            if self._rows is not None and self._rows.is_pinned()
            else "in main memory",
            "map": "in a mapped scratch file",
            "stream": "in the store, read anew for every batch",
        }
        own = self.lengths[: len(self.slide_ids)]
        count = f"{int(own.sum()):,} instances of {len(self.slide_ids)} slides"
        if self.views:
            count += f", in {1 + self.views} views"
        return f"{count}, {gb(self.bytes)}, {places[self.tier.name]} ({self.tier.why})"

    def good_tiles(self, index: int) -> NDArray[np.intp] | None:
        """Return the tiles of the slide that are in its bag, or None for all."""
        return self._good.get(index % len(self.slide_ids))

    def _source(self, index: int) -> tuple[FeatureStore, str]:
        """The store of a bag's view, and its slide."""
        view, slide = divmod(index, len(self.slide_ids))
        return self._stores[view], self.slide_ids[slide]

    def bag(self, index: int) -> Tensor:
        """One bag's features [n, D], where the cache has them."""
        return self.batch([index], _CPU if self._rows is None else self._rows.device)[0]

    def batch(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Pack bags into one tensor.

        Returns:
            Features [N, D] on the device, in the dtype of the store: a slice of the cache where
            the bags follow one another there, else one copy. And bags int64 [B, 2] of (start,
            length), on the CPU.
        """
        return self._batch(indices, device, _Buffers(0, self.dim, self._dtype))

    def batches(
        self, chosen: Sequence[Sequence[int]], device: torch.device, whole: int | None = None
    ) -> Generator[tuple[Tensor | Chunks, Tensor], None, None]:
        """Yield `batch` of each; a thread prepares them unless all features are in memory.

        The memory of a batch is reused once the next is taken.

        Args:
            chosen: The bags of each batch.
            device: Where to.
            whole: A bag alone in its batch and longer than this comes as chunks of about so many
                rows, where the cache has them, each read when it is asked for.
        """

        def prepare(indices: Sequence[int]) -> tuple[Tensor | Chunks, Tensor]:
            if whole is None or len(indices) != 1 or self.lengths[indices[0]] <= whole:
                return self._batch(indices, device, buffers)
            bags = torch.tensor([[0, int(self.lengths[indices[0]])]])
            if self._rows is None:
                return StoredBag(*self._source(indices[0]), rows=whole), bags
            return torch.split(self.bag(indices[0]), whole), bags

        kept = self._rows is not None and self._rows.device == device
        if kept and self.tier.name != "map":
            buffers = _Buffers(1, self.dim, self._dtype)
            for indices in chosen:
                yield prepare(indices)
            return
        # on a GPU the staging buffer is free again once its copy, awaited below, has ended
        buffers = _Buffers(1 if device.type == "cuda" else _AHEAD + 1, self.dim, self._dtype)
        side = torch.cuda.Stream(device) if device.type == "cuda" else None

        def make(indices: Sequence[int]) -> _Made:
            if side is None:
                return *prepare(indices), None
            with torch.cuda.stream(side):
                x, bags = prepare(indices)
                done = side.record_event()
            done.synchronize()
            return x, bags, done

        pool = ThreadPoolExecutor(1)
        try:
            todo = iter(chosen)
            made: deque[Future[_Made]] = deque(pool.submit(make, i) for i in islice(todo, _AHEAD))
            while made:
                made.extend(pool.submit(make, i) for i in islice(todo, 1))
                x, bags, done = made.popleft().result()
                if done is not None and isinstance(
                    x, Tensor
                ):  # the allocator must know that this stream reads it
                    x.record_stream(torch.cuda.current_stream(device))
                yield x, bags
        finally:
            pool.shutdown(cancel_futures=True)

    def _batch(
        self, indices: Sequence[int], device: torch.device, buffers: "_Buffers"
    ) -> tuple[Tensor, Tensor]:
        chosen = np.array(indices, np.intp)
        lengths = torch.from_numpy(self.lengths[chosen])
        bags = torch.stack([lengths.cumsum(0) - lengths, lengths], 1)
        if self._rows is None:
            return self._read(chosen, buffers, device).to(device, non_blocking=True), bags
        runs = _runs(self._starts[chosen], self.lengths[chosen])
        parts = [self._rows[start:stop] for start, stop in runs] or [self._rows[:0]]
        if len(parts) == 1:
            return parts[0].to(device, non_blocking=True), bags
        rows = int(lengths.sum())
        if self._rows.device == device == _CPU:
            return torch.cat(parts, out=buffers.take(rows)), bags
        if self._rows.device == device:
            return torch.cat(parts), bags
        if not self._rows.is_pinned():
            x = torch.cat(parts, out=buffers.take(rows, pinned=True))
            return x.to(device, non_blocking=True), bags
        x = torch.empty((rows, self.dim), dtype=self._dtype, device=device)
        for to, part in zip(torch.split(x, [len(p) for p in parts]), parts, strict=True):
            to.copy_(part, non_blocking=True)
        return x, bags

    def _read(self, chosen: NDArray[np.intp], buffers: "_Buffers", device: torch.device) -> Tensor:
        """Bags from the store."""
        slides = (chosen % max(len(self.slide_ids), 1)).tolist()
        lengths = [self._tiles[i] for i in slides]
        x = buffers.take(sum(lengths), pinned=device.type == "cuda")
        starts = np.cumsum(lengths) - lengths
        # the bags of one view that follow one another in one go
        at = 0
        for store, run in groupby(map(self._source, chosen.tolist()), key=itemgetter(0)):
            ids = [slide_id for _, slide_id in run]
            store.read_packed(ids, out=_numpy(x[starts[at] :]))
            at += len(ids)
        if not any(i in self._good for i in slides):
            return x
        good = [
            start + self._good.get(i, np.arange(length))
            for i, start, length in zip(slides, starts.tolist(), lengths, strict=True)
        ]
        return x[torch.from_numpy(np.concatenate(good))]

    def _allocate(self, device: torch.device, scratch: Path) -> Tensor:
        shape = (int(self.lengths.sum()), self.dim)
        if self.tier.name == "device":
            return torch.empty(shape, dtype=self._dtype, device=device)
        if self.tier.name == "host" or not self.bytes:
            rows = torch.empty(shape, dtype=self._dtype)
            if device.type == "cuda" and self.bytes:
                _pin(rows)
            return rows
        with TemporaryFile(dir=scratch) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self.bytes)  # a full disk kills a mapping
            except OSError as error:
                raise UsageError(
                    f"cannot keep {gb(self.bytes)} of features in {scratch}: {error.strerror}",
                    "make room, or give cache=stream",
                ) from None
            mapped = np.memmap(file, np.uint8, "r+")
        return torch.from_numpy(mapped).view(self._dtype).view(shape)

    def _load(self, index: int) -> None:
        """Read a slide to its place."""
        assert self._rows is not None
        start, length = self._starts[index], self.lengths[index]
        place, (store, slide_id) = self._rows[start : start + length], self._source(index)
        good = self.good_tiles(index)
        if good is not None:
            x = torch.from_numpy(store.features(slide_id)[good])
            place.copy_(x.view(self._dtype))
        elif self._rows.is_cuda:
            place.copy_(torch.from_numpy(store.features(slide_id)).view(self._dtype))
        elif length:
            store.features(slide_id, out=_numpy(place))


def _pin(rows: Tensor) -> None:
    """Pin memory where it lies; pageable it stays, which is slower, where the system refuses.

    `pin_memory=True` would round the size up to a power of two: 65 GB would take 128.
    """
    runtime: Any = torch.cuda.cudart()
    start, size = rows.data_ptr(), rows.nbytes
    if int(runtime.cudaHostRegister(start, size, 0)) == 0:
        undo = weakref.finalize(rows.untyped_storage(), runtime.cudaHostUnregister, start)
        undo.atexit = False  # the process takes it along


class _Buffers:
    """Buffers for batches, reused in turn: fresh pages cost more than the copy into them.

    Args:
        count: Buffers in turn; 0 for new memory every time.
        dim: Row length.
        dtype: Of the rows.
    """

    def __init__(self, count: int, dim: int, dtype: torch.dtype) -> None:
        self._dim, self._dtype, self._count = dim, dtype, count
        self._turn: deque[Tensor] = deque(maxlen=count)

    def take(self, rows: int, *, pinned: bool = False) -> Tensor:
        """[rows, dim]."""
        buffer = self._turn.popleft() if len(self._turn) == self._count > 0 else None
        if buffer is None or len(buffer) < rows:
            buffer = torch.empty((rows, self._dim), dtype=self._dtype, pin_memory=pinned)
        self._turn.append(buffer)
        return buffer[:rows]


def _runs(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Merge adjacent slices: (start, stop) of each."""
    runs: list[tuple[int, int]] = []
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + length)
        elif length:
            runs.append((start, start + length))
    return runs


def _numpy(rows: Tensor) -> NDArray[Any]:
    """The same memory in the dtype that the store writes; numpy has no bfloat16."""
    return rows.view(torch.uint16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()
