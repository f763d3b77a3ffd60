"""What decoding hands over: a batch of tiles, and what it cost."""

import queue
import threading
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Slab = NDArray[np.uint8] | Tensor


@dataclass(slots=True)
class DecodeStats:
    """What decoding cost so far.

    Attributes:
        tiles: Tiles decoded, bad ones included.
        bad: Tiles with a status other than 0.
        cpu_s: CPU seconds of the decoding threads.
        busy_s: Wall seconds of the decoding threads, added up.
        wait_s: Wall seconds that the consumer waited for a batch.
        decoder: What decoded on the device, "" where nothing did.
        refused: Why the device did not, "" where it did or was not asked to.
        probe_difference: Mean grey levels between the device's pixels and a CPU's.
        on_cpu: Source tiles of a slide decoded on a device that a CPU decoded.
    """

    tiles: int = 0
    bad: int = 0
    cpu_s: float = 0.0
    busy_s: float = 0.0
    wait_s: float = 0.0
    decoder: str = ""
    refused: str = ""
    probe_difference: float = 0.0
    on_cpu: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)


@dataclass(slots=True)
class TileBatch:
    """Tiles of consecutive grid rows.

    Attributes:
        pixels: uint8 [n, read_px, read_px, 3], part of a slab: valid until `release`. An array, or
            a tensor on the device that decoded them.
        rows: Index of the first tile in the grid.
        status: uint8 [n] of `TileStatus`.
        grid: Which of several grids.
    """

    pixels: NDArray[np.uint8] | Tensor
    rows: int
    status: NDArray[np.uint8]
    grid: int
    _slab: Slab | None
    _free: "queue.SimpleQueue[Slab]"

    def release(self) -> None:
        """Give the slab back, which nobody reads any more; a second call does nothing."""
        slab, self._slab = self._slab, None
        if slab is not None:
            self._free.put(slab)
