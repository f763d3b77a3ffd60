"""Tiles ahead of their consumer: threads decode into a bounded ring of slabs, in order."""

import queue
import threading
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hmil_fast.io.slide import SlideReader
from hmil_fast.io.tiles.grid import TileGrid

CHUNK = 32  # neighbouring tiles that one thread decodes in one go: they share source tiles
MAX_SLAB_BYTES = 512 * 2**20


@dataclass(slots=True)
class DecodeStats:
    """What decoding cost so far.

    Attributes:
        tiles: Tiles decoded, bad ones included.
        bad: Tiles with a status other than 0.
        cpu_s: CPU seconds of the decoding threads.
        busy_s: Wall seconds of the decoding threads, added up.
        wait_s: Wall seconds that the consumer waited for a batch.
    """

    tiles: int = 0
    bad: int = 0
    cpu_s: float = 0.0
    busy_s: float = 0.0
    wait_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)


@dataclass(slots=True)
class TileBatch:
    """Tiles of consecutive grid rows.

    Attributes:
        pixels: uint8 [n, read_px, read_px, 3], part of a slab: valid until `release`.
        rows: Index of the first tile in the grid.
        status: uint8 [n] of `TileStatus`.
    """

    pixels: NDArray[np.uint8]
    rows: int
    status: NDArray[np.uint8]
    _slab: NDArray[np.uint8] | None
    _free: "queue.SimpleQueue[NDArray[np.uint8]]"

    def release(self) -> None:
        """Give the slab back; a second call does nothing."""
        slab, self._slab = self._slab, None
        if slab is not None:
            self._free.put(slab)


def decode_tiles(
    reader: SlideReader,
    grid: TileGrid,
    *,
    batch: int,
    threads: int,
    slabs: int = 4,
    rows: slice | None = None,
    stats: DecodeStats | None = None,
) -> Generator[TileBatch, None, None]:
    """Decode a grid's tiles in order, up to `slabs` batches at a time in memory.

    Release every batch; while `slabs` of them are held, the next one waits for a release from
    another thread. Leaving the iterator (its end, `close`, an exception) ends the threads.

    Args:
        reader: The open slide; it must stay open until the iterator has ended.
        grid: The tiles.
        batch: Tiles a batch; fewer where a slab would exceed 512 MiB. The last may be shorter.
        threads: Decoding threads.
        slabs: Length of the ring.
        rows: Part of the grid, step 1; all by default.
        stats: Filled while tiles are decoded.

    Yields:
        Batches in the order of the grid.
    """
    first, last, step = (rows or slice(None)).indices(len(grid.xy))
    assert step == 1
    batch = max(1, min(batch, MAX_SLAB_BYTES // (grid.read_px**2 * 3), last - first))
    stats = stats if stats is not None else DecodeStats()
    shape = (batch, grid.read_px, grid.read_px, 3)
    ring = min(slabs, -(-(last - first) // batch))
    free: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()
    for _ in range(ring):
        free.put(np.empty(shape, np.uint8))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    ahead: deque[tuple[TileBatch, list[Future[None]]]] = deque()
    start = first
    try:
        while start < last or ahead:
            while start < last and (not ahead or not free.empty()):
                slab = free.get()
                count = min(batch, last - start)
                made = TileBatch(slab[:count], start, np.empty(count, np.uint8), slab, free)
                parts = [slice(at, min(at + CHUNK, count)) for at in range(0, count, CHUNK)]
                ahead.append(
                    (made, [pool.submit(_fill, reader, grid, made, part, stats) for part in parts])
                )
                start += count
            made, futures = ahead.popleft()
            began = time.perf_counter()
            for future in futures:
                future.result()
            stats.wait_s += time.perf_counter() - began
            yield made
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _fill(
    reader: SlideReader, grid: TileGrid, made: TileBatch, part: slice, stats: DecodeStats
) -> None:
    cpu, wall = time.thread_time(), time.perf_counter()
    xy = grid.xy[made.rows + part.start : made.rows + part.stop]
    made.status[part] = reader.read(grid.level, xy, grid.read_px, made.pixels[part])
    with stats.lock:
        stats.tiles += len(xy)
        stats.bad += int(np.count_nonzero(made.status[part]))
        stats.cpu_s += time.thread_time() - cpu
        stats.busy_s += time.perf_counter() - wall
