"""Collect tiles of several slides in fixed-size batches, and encode these without a GPU wait."""

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hmil_fast.extraction.pipeline.slide_job import ActiveSlide
from hmil_fast.extraction.pipeline.timings import Timings

Parts = list[tuple[ActiveSlide, int]]
_TORCH = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


class StaticBatch:
    """The encoder's input: always `size` tiles, in the same memory.

    Of the same shape whatever is in it, because the last bits of a feature depend on the shape of
    the batch. Rows that no slide fills keep what was in them before.

    Args:
        size: Tiles.
        px: Their side.
        device: Where they lie.
    """

    def __init__(self, size: int, px: int, device: torch.device) -> None:
        shape = (size, 3, px, px)
        self._tiles = torch.zeros(shape, device=device).contiguous(
            memory_format=torch.channels_last
        )
        self._parts: Parts = []
        self._filled = 0

    @property
    def room(self) -> int:
        """Tiles that still fit in."""
        return len(self._tiles) - self._filled

    def add(self, slide: ActiveSlide, tiles: Tensor) -> None:
        """Append tiles [n ≤ room, 3, px, px] of a slide."""
        stop = self._filled + len(tiles)
        self._tiles[self._filled : stop].copy_(tiles)
        self._filled = stop
        slide.added += len(tiles)
        if self._parts and self._parts[-1][0] is slide:
            self._parts[-1] = slide, self._parts[-1][1] + len(tiles)
        else:
            self._parts.append((slide, len(tiles)))

    def take(self) -> tuple[Tensor, Parts]:
        """All tiles, and how many in turn are of which slide; the batch is then empty."""
        parts, self._parts, self._filled = self._parts, [], 0
        return self._tiles, parts


def encode_timed(
    encoder: Callable[[Tensor], Tensor], tiles: Tensor, dtype: str, timings: Timings
) -> Callable[[], NDArray[Any]]:
    """Start encoding a batch; features come back when the result is called, in any thread.

    On a GPU nothing waits here: features are cast there and copied to pinned memory behind the
    encoder's work, and the events around it are read when they come back.

    Args:
        encoder: Tiles to features float32 [n, D].
        tiles: [n, 3, px, px].
        dtype: The store's.
        timings: Takes "encode (GPU)".

    Returns:
        A call that gives the features [n, D] as the store takes them.
    """
    if tiles.device.type != "cuda":
        features = encoder(tiles).to(_TORCH[dtype])
        return lambda: _numpy(features)
    stream = torch.cuda.current_stream(tiles.device)
    start, encoded, copied = (
        torch.cuda.Event(enable_timing=timed) for timed in (True, True, False)
    )
    start.record(stream)
    features = encoder(tiles)
    encoded.record(stream)
    features = features.to(_TORCH[dtype])
    host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
    host.copy_(features, non_blocking=True)
    copied.record(stream)

    def back() -> NDArray[Any]:
        copied.synchronize()
        timings.add("encode (GPU)", start.elapsed_time(encoded) / 1000)
        return _numpy(host)

    return back


def _numpy(features: Tensor) -> NDArray[Any]:
    if features.dtype == torch.bfloat16:
        features = features.view(torch.uint16)
    return features.numpy()
