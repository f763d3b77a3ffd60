"""Decode tiles ahead of use: threads fill a bounded ring of slabs, in order."""

import math
import queue
import time
from collections import defaultdict, deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from hmil_fast.io.slide import SlideReader, TileBand
from hmil_fast.io.tiles.batch import DecodeStats, Slab, TileBatch
from hmil_fast.io.tiles.fill import OnDevice, OnHost
from hmil_fast.io.tiles.grid import TileGrid

if TYPE_CHECKING:
    from hmil_fast.io.slide.device_band import DeviceBand
    from hmil_fast.io.slide.device_decoder import DeviceDecoder

MAX_SLAB_BYTES = 512 * 2**20


def decode_tiles(
    reader: SlideReader,
    grids: TileGrid | Sequence[TileGrid],
    *,
    batch: int,
    threads: int,
    slabs: int = 4,
    rows: slice | None = None,
    stats: DecodeStats | None = None,
    to: "DeviceDecoder | torch.device | None" = None,
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
        to: Where the tiles go: for a GPU slabs lie in pinned memory, from which it copies without a
            wait. A decoder decodes on its device; where it is not for the slide a CPU does, and
            `stats` say why.

    Yields:
        Batches of one grid each, in its order; those of several grids from the slide's top down.
    """
    grids = [grids] if isinstance(grids, TileGrid) else list(grids)
    stats = stats if stats is not None else DecodeStats()
    plan = _plan(grids, batch, rows)
    slab_bytes = max((count * grids[n].read_px ** 2 * 3 for n, _, count in plan), default=0)
    place = to if to is None or isinstance(to, torch.device) else to.device
    decoder = None if to is place else cast("DeviceDecoder", to)
    bands = _on_device(reader, grids, plan, decoder, stats) if decoder is not None else None
    free: queue.SimpleQueue[Slab] = queue.SimpleQueue()
    for _ in range(min(slabs, len(plan))):
        free.put(_slab(slab_bytes, place, None if bands is None else decoder))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    fill: OnHost | OnDevice
    if bands is not None and decoder is not None:
        fill = OnDevice(grids, stats, pool, bands, decoder)
    else:
        fill = OnHost(grids, stats, pool, _bands(reader, grids, plan))
    ahead: deque[tuple[TileBatch, list[Future[None]]]] = deque()
    left = iter(plan)
    following = next(left, None)
    try:
        while following is not None or ahead:
            while following is not None and (not ahead or not free.empty()):
                number, start, count = following
                slab, shape = free.get(), (count, *2 * (grids[number].read_px,), 3)
                pixels = slab[: math.prod(shape)].reshape(shape)
                made = TileBatch(pixels, start, np.empty(count, np.uint8), number, slab, free)
                ahead.append((made, fill.start(made)))
                following = next(left, None)
            made, futures = ahead.popleft()
            began = time.perf_counter()
            for future in futures:
                future.result()
            stats.wait_s += time.perf_counter() - began
            yield made
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        fill.close()


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


def _asked(
    grids: Sequence[TileGrid], plan: Sequence[tuple[int, int, int]]
) -> dict[int, list[tuple[NDArray[np.int64], int]]]:
    """For each level that is read the tiles in the plan, as (xy, size)."""
    asked = defaultdict(list)
    for number in dict.fromkeys(number for number, _, _ in plan):
        spans = [(start, start + count) for n, start, count in plan if n == number]
        grid = grids[number]
        asked[grid.level].append((grid.xy[spans[0][0] : spans[-1][1]], grid.read_px))
    return asked


def _bands(
    reader: SlideReader, grids: Sequence[TileGrid], plan: Sequence[tuple[int, int, int]]
) -> dict[int, TileBand]:
    return {level: reader.band(level, tiles) for level, tiles in _asked(grids, plan).items()}


def _on_device(
    reader: SlideReader,
    grids: Sequence[TileGrid],
    plan: Sequence[tuple[int, int, int]],
    device: "DeviceDecoder",
    stats: DecodeStats,
) -> "dict[int, DeviceBand] | None":
    """The bands of a slide that the device decodes as a CPU does, else None and why."""
    from hmil_fast.io.slide.device_band import DeviceBand
    from hmil_fast.io.slide.sources import Unsuited
    from hmil_fast.io.slide.tiled_reader import TiledReader

    if not isinstance(reader, TiledReader):
        stats.refused = f"{reader.info.reader} decodes on the CPU only"
        return None
    asked = _asked(grids, plan)
    try:
        bands = {
            level: DeviceBand(reader, level, tiles, device, len(asked))
            for level, tiles in asked.items()
        }
        apart = [band.probe() for band in bands.values()]
    except Unsuited as unsuited:
        stats.refused = str(unsuited)
        return None
    stats.probe_difference = max(apart, default=0.0)
    stats.decoder = ", ".join(dict.fromkeys(band.name for band in bands.values()))
    return bands


def _slab(size: int, place: torch.device | None, decoder: "DeviceDecoder | None") -> Slab:
    if decoder is not None:
        with decoder.stream.use():
            return torch.empty(size, dtype=torch.uint8, device=place)
    if place is not None and place.type == "cuda":
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return np.empty(size, np.uint8)
