"""Collect tiles of several slides in fixed-size batches, and encode these without a GPU wait."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hmil_fast.extraction.pipeline.slide_job import ActiveSlide
from hmil_fast.extraction.pipeline.timings import Timings
from hmil_fast.streams import DONE, Event, Stream, current_stream, own_stream

Parts = list[tuple[ActiveSlide, int]]
_TORCH = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


class StaticBatches:
    """The encoder's input: always `size` tiles, in buffers that are filled and encoded in turn.

    Of the same shape whatever is in it, because the last bits of a feature depend on the shape of
    the batch. Rows that no slide fills keep what was in them before. On a GPU one buffer is filled,
    in a stream of its own, while the other is encoded: events keep the two apart, and the host
    never waits.

    Args:
        size: Tiles.
        px: Their side.
        device: Where they lie.
        buffers: How many are used in turn.
        tiles: The stream that fills them.
        encoder: The stream that reads them.
    """

    def __init__(
        self,
        size: int,
        px: int,
        device: torch.device,
        *,
        buffers: int | None = None,
        tiles: Stream | None = None,
        encoder: Stream | None = None,
    ) -> None:
        self.stream = tiles or own_stream(device)
        self._encoder = encoder or current_stream(device)
        # a second one on a CPU, where nothing overlaps, would only push others out of its caches
        count = buffers or (2 if device.type == "cuda" else 1)
        with self.stream.use():
            self._buffers = [
                torch.zeros(size, 3, px, px, device=device).contiguous(
                    memory_format=torch.channels_last
                )
                for _ in range(count)
            ]
        self._encoded: list[Event] = [DONE] * count  # after which a buffer may be written again
        self._turn = 0
        self._parts: Parts = []
        self._filled = 0

    @property
    def room(self) -> int:
        """Tiles that still fit in."""
        return len(self._buffers[self._turn]) - self._filled

    def add(self, slide: ActiveSlide, tiles: Tensor) -> None:
        """Append tiles [n ≤ room, 3, px, px] of a slide, made in `stream`."""
        if not self._filled:
            self.stream.wait(self._encoded[self._turn])
        stop = self._filled + len(tiles)
        with self.stream.use():
            self._buffers[self._turn][self._filled : stop].copy_(tiles)
        self._filled = stop
        slide.added += len(tiles)
        if self._parts and self._parts[-1][0] is slide:
            self._parts[-1] = slide, self._parts[-1][1] + len(tiles)
        else:
            self._parts.append((slide, len(tiles)))

    @contextmanager
    def taken(self) -> Iterator[tuple[Tensor, Parts]]:
        """All tiles, and how many in turn are of which slide, to be encoded within the block.

        The next buffer is filled after it.
        """
        parts, self._parts, self._filled = self._parts, [], 0
        self._encoder.wait(self.stream.record())
        turn, self._turn = self._turn, (self._turn + 1) % len(self._buffers)
        try:
            yield self._buffers[turn], parts
        finally:
            self._encoded[turn] = self._encoder.record()


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
