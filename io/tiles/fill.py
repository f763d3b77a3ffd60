"""Fill a batch with tiles, by threads on the host or by a device."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hmil_fast.io.slide import TileBand
from hmil_fast.io.tiles.batch import DecodeStats, TileBatch
from hmil_fast.io.tiles.grid import TileGrid

if TYPE_CHECKING:
    from hmil_fast.io.slide.device_band import DeviceBand
    from hmil_fast.io.slide.device_decoder import DeviceDecoder

CHUNK = 32  # neighbouring tiles that one thread works on in one go


class OnHost:
    """Threads decode and cut, each a few tiles."""

    def __init__(
        self,
        grids: Sequence[TileGrid],
        stats: DecodeStats,
        pool: ThreadPoolExecutor,
        bands: Mapping[int, TileBand],
    ) -> None:
        self._grids, self._stats, self._pool, self._bands = grids, stats, pool, bands

    def start(self, made: TileBatch) -> list[Future[None]]:
        """Begin to fill a batch, which is done when all futures are."""
        return [self._pool.submit(self._fill, made, part) for part in _parts(made)]

    def close(self) -> None:
        """Nothing to free."""

    def _fill(self, made: TileBatch, part: slice) -> None:
        with timed(self._stats):
            grid = self._grids[made.grid]
            xy = grid.xy[made.rows + part.start : made.rows + part.stop]
            assert isinstance(made.pixels, np.ndarray)
            band = self._bands[grid.level]
            made.status[part] = band.read(xy, grid.read_px, made.pixels[part])
        _count(self._stats, made.status[part])


class OnDevice:
    """Threads read the bytes; one more has the device decode and cut a batch at a time."""

    def __init__(
        self,
        grids: Sequence[TileGrid],
        stats: DecodeStats,
        pool: ThreadPoolExecutor,
        bands: "Mapping[int, DeviceBand]",
        device: "DeviceDecoder",
    ) -> None:
        self._grids, self._stats, self._pool = grids, stats, pool
        self._bands, self._device = bands, device
        self._one = ThreadPoolExecutor(1, thread_name_prefix="decode-device")

    def start(self, made: TileBatch) -> list[Future[None]]:
        """Begin to fill a batch, which is done when all futures are."""
        loads = [self._pool.submit(self._load, made, part) for part in _parts(made)]
        return [self._one.submit(self._read, made, loads)]

    def close(self) -> None:
        """End the thread, and give the places of the source tiles back."""
        self._one.shutdown(wait=True, cancel_futures=True)
        for band in self._bands.values():
            band.close()
        self._stats.on_cpu = sum(band.on_cpu for band in self._bands.values())

    def _load(self, made: TileBatch, part: slice) -> None:
        with timed(self._stats):
            grid, xy = self._place(made)
            self._bands[grid.level].load(xy[part], grid.read_px)

    def _read(self, made: TileBatch, loads: list[Future[None]]) -> None:
        for load in loads:
            load.result()
        with timed(self._stats):
            grid, xy = self._place(made)
            assert isinstance(made.pixels, Tensor)
            made.status[:] = self._bands[grid.level].read(xy, grid.read_px, made.pixels)
            self._device.stream.record().synchronize()  # no other stream needs to wait for it
        _count(self._stats, made.status)

    def _place(self, made: TileBatch) -> tuple[TileGrid, NDArray[np.int64]]:
        grid = self._grids[made.grid]
        return grid, grid.xy[made.rows : made.rows + len(made.status)]


@contextmanager
def timed(stats: DecodeStats) -> Iterator[None]:
    """Add what a thread spends within the block."""
    cpu, wall = time.thread_time(), time.perf_counter()
    yield
    with stats.lock:
        stats.cpu_s += time.thread_time() - cpu
        stats.busy_s += time.perf_counter() - wall


def _count(stats: DecodeStats, status: NDArray[np.uint8]) -> None:
    with stats.lock:
        stats.tiles += len(status)
        stats.bad += int(np.count_nonzero(status))


def _parts(made: TileBatch) -> list[slice]:
    count = len(made.status)
    return [slice(at, min(at + CHUNK, count)) for at in range(0, count, CHUNK)]
