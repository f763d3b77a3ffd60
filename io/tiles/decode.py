"""Decode tiles ahead of use: threads fill a bounded ring of slabs, in order."""

import math
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hmil_fast.io.slide import SlideReader, TileBand
from hmil_fast.io.tiles.grid import TileGrid

CHUNK = 32  # neighbouring tiles that one thread decodes in one go
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
        grid: Which of several grids.
    """

    pixels: NDArray[np.uint8]
    rows: int
    status: NDArray[np.uint8]
    grid: int
    _slab: NDArray[np.uint8] | None
    _free: "queue.SimpleQueue[NDArray[np.uint8]]"

    def release(self) -> None:
        """Give the slab back; a second call does nothing."""
        slab, self._slab = self._slab, None
        if slab is not None:
            self._free.put(slab)


def decode_tiles(
    reader: SlideReader,
    grids: TileGrid | Sequence[TileGrid],
    *,
    batch: int,
    threads: int,
    slabs: int = 4,
    rows: slice | None = None,
    stats: DecodeStats | None = None,
) -> Generator[TileBatch, None, None]:
    """Decode tiles in order, up to `slabs` batches at a time in memory.

    Each of the slide's own tiles is decoded once, however the grids lie on it; several grids of one
    level share what is decoded. So about one row of the slide's tiles is held besides the slabs.

    Release every batch; while `slabs` of them are held, the next one waits for a release from
    another thread. Leaving the iterator (its end, `close`, an exception) ends the threads.

    Args:
        reader: The open slide; it must stay open until the iterator has ended.
        grids: The tiles of one or several scales.
        batch: Tiles a batch; fewer where a slab would exceed 512 MiB. The last may be shorter.
        threads: Decoding threads.
        slabs: Length of the ring.
        rows: Part of a single grid, step 1; all by default.
        stats: Filled while tiles are decoded.

    Yields:
        Batches of one grid each, in its order; those of several grids from the slide's top down.
    """
    grids = [grids] if isinstance(grids, TileGrid) else list(grids)
    stats = stats if stats is not None else DecodeStats()
    plan = _plan(grids, batch, rows)
    slab_bytes = max((count * grids[n].read_px ** 2 * 3 for n, _, count in plan), default=0)
    free: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()
    for _ in range(min(slabs, len(plan))):
        free.put(np.empty(slab_bytes, np.uint8))
    bands = _bands(reader, grids, plan)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    ahead: deque[tuple[TileBatch, list[Future[None]]]] = deque()
    left = iter(plan)
    following = next(left, None)
    try:
        while following is not None or ahead:
            while following is not None and (not ahead or not free.empty()):
                number, start, count = following
                grid, slab = grids[number], free.get()
                shape = (count, grid.read_px, grid.read_px, 3)
                pixels = slab[: math.prod(shape)].reshape(shape)
                made = TileBatch(pixels, start, np.empty(count, np.uint8), number, slab, free)
                parts = [slice(at, min(at + CHUNK, count)) for at in range(0, count, CHUNK)]
                band = bands[grid.level]
                ahead.append(
                    (made, [pool.submit(_fill, band, grid, made, part, stats) for part in parts])
                )
                following = next(left, None)
            made, futures = ahead.popleft()
            began = time.perf_counter()
            for future in futures:
                future.result()
            stats.wait_s += time.perf_counter() - began
            yield made
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _plan(grids: Sequence[TileGrid], batch: int, rows: slice | None) -> list[tuple[int, int, int]]:
    """(grid, first tile, tiles) of every batch, by where on the slide its last tile ends."""
    assert rows is None or len(grids) == 1
    plan = []
    for number, grid in enumerate(grids):
        first, last, step = (rows or slice(None)).indices(len(grid.xy))
        assert step == 1
        most = max(1, min(batch, MAX_SLAB_BYTES // (grid.read_px**2 * 3)))
        for start in range(first, last, most):
            count = min(most, last - start)
            end = float(grid.coords[start + count - 1, 1]) + grid.tile_px_level0
            plan.append((end, number, start, count))
    # a stable order: within a grid the ends never decrease
    return [entry[1:] for entry in sorted(plan, key=lambda entry: entry[0])]


def _bands(
    reader: SlideReader, grids: Sequence[TileGrid], plan: Sequence[tuple[int, int, int]]
) -> dict[int, TileBand]:
    """One band for each level that is read, told of just the tiles in the plan."""
    asked = defaultdict(list)
    for number in dict.fromkeys(number for number, _, _ in plan):
        spans = [(start, start + count) for n, start, count in plan if n == number]
        grid = grids[number]
        asked[grid.level].append((grid.xy[spans[0][0] : spans[-1][1]], grid.read_px))
    return {level: reader.band(level, tiles) for level, tiles in asked.items()}


def _fill(band: TileBand, grid: TileGrid, made: TileBatch, part: slice, stats: DecodeStats) -> None:
    cpu, wall = time.thread_time(), time.perf_counter()
    xy = grid.xy[made.rows + part.start : made.rows + part.stop]
    made.status[part] = band.read(xy, grid.read_px, made.pixels[part])
    with stats.lock:
        stats.tiles += len(xy)
        stats.bad += int(np.count_nonzero(made.status[part]))
        stats.cpu_s += time.thread_time() - cpu
        stats.busy_s += time.perf_counter() - wall
