"""Reads of one level whose pixels never leave the device: tiles are decoded in place and cut there.

Bytes are read and checked on the host, in the threads that decode for a CPU: so a bad tile has the
same status wherever tiles are decoded.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hmil_fast.io.slide.device_decoder import MOST_APART, DeviceDecoder
from hmil_fast.io.slide.jpeg_check import Look, is_subsampled
from hmil_fast.io.slide.protocol import Int64, TileStatus, UInt8
from hmil_fast.io.slide.source_tile_cache import touched, uses
from hmil_fast.io.slide.sources import JPEG, Unsuited
from hmil_fast.io.slide.tiled_reader import TiledReader

PROBES = 4
MOST_OF_ONE = 2.0  # mean grey levels between both decoders, of any of them


@dataclass(slots=True)
class _Loaded:
    """A source tile that was read but is not on the device yet: bytes, or a CPU's pixels."""

    data: bytes = b""
    pixels: UInt8 | None = None
    status: int = TileStatus.OK


class DeviceBand:
    """A `Band` on a device: `load` in any thread, then `read` in one, in the order of the loads.

    Args:
        reader: The slide; it reads the bytes, and decodes what the device does not.
        level: Pyramid level.
        asked: The grids that will be read, as (xy, size); see `SlideReader.band`.
        decoder: Of the device.
        bands: Of the slide that are read in turns, and share the places.

    Attributes:
        on_cpu: Source tiles that a CPU has decoded.

    Raises:
        Unsuited: The decoder is not for this level's tiles.
    """

    def __init__(
        self,
        reader: TiledReader,
        level: int,
        asked: Sequence[tuple[Int64, int]],
        decoder: DeviceDecoder,
        bands: int = 1,
    ) -> None:
        self._reader, self._level, self._decoder = reader, level, decoder
        self._facts = facts = reader.facts(level)
        self.name = decoder.name(facts.compression)
        self._slots = decoder.slots(facts.tile)
        self._most = len(self._slots) // bands
        self._uses = uses(facts, asked)
        for _, size in asked:
            across, down = (size // side + 2 for side in facts.tile)
            if across * down > self._most:
                raise Unsuited(f"a tile of {size} px lies on too many of {facts.tile} px")
        self._places: dict[int, int] = {}  # of source tiles on the device, the oldest first
        self._loaded: dict[int, _Loaded | None] = {}  # None while a thread reads it
        self._bad: dict[int, int] = {}  # their status
        self._lock = threading.Lock()
        self.on_cpu = 0

    def load(self, xy: Int64, size: int) -> None:
        """Read the bytes of the source tiles under tiles that will be read soon."""
        for number in dict.fromkeys(n for box in self._boxes(xy, size) for n in box):
            with self._lock:
                if number in self._places or number in self._loaded or number in self._bad:
                    continue
                self._loaded[number] = None
            made = self._load(number)
            with self._lock:
                if number in self._loaded:  # else it was wanted before it was there
                    self._loaded[number] = made

    def read(self, xy: Int64, size: int, out: Tensor) -> UInt8:
        """Read tiles into memory of the device, in the decoder's stream; as `TileBand.read`.

        Args:
            xy: int64 [n, 2], top-left corners in px of the level; each was loaded.
            size: Side of a tile.
            out: uint8 [n, size, size, 3] on the device.
        """
        status = np.zeros(len(xy), np.uint8)
        boxes = self._boxes(xy, size)
        for start, stop in self._parts(boxes):
            part = boxes[start:stop]
            self._fetch(list(dict.fromkeys(n for box in part for n in box)))
            for n, box in enumerate(part, start):
                status[n] = max((self._bad.get(number, 0) for number in box), default=0)
            with self._decoder.stream.use():
                self._cut(xy[start:stop], size, part, status[start:stop], out[start:stop])
            self._release(part)
        return status

    def probe(self) -> float:
        """Decode some tiles on both, and compare: the mean difference in grey levels.

        Raises:
            Unsuited: They differ by more than two right decoders do.
        """
        used = np.flatnonzero(self._uses)
        chosen = used[np.linspace(0, len(used) - 1, min(PROBES, len(used))).astype(int)]
        pairs = []
        for number in chosen.tolist():
            loaded = self._load(number)
            if not loaded.data:
                continue
            (cpu,) = self._reader.decode(self._level, [number], [])
            places, done = self._decode([loaded.data])
            with self._decoder.stream.use():
                ours = self._slots.pixels[places[0]].to("cpu", torch.int16, copy=True)
            read = self._decoder.stream.record()
            read.synchronize()
            self._slots.give(places, read)
            if done[0] and cpu.pixels is not None:
                high, wide = cpu.pixels.shape[:2]
                pairs.append((ours.numpy()[:high, :wide], cpu.pixels))
        apart = [float(np.abs(ours - cpu).mean()) for ours, cpu in pairs]
        if apart and (np.mean(apart) >= MOST_APART or max(apart) >= MOST_OF_ONE):
            raise Unsuited(
                f"{self.name} decodes its tiles otherwise, by {max(apart):.1f} grey levels"
            )
        return float(np.mean(apart)) if apart else 0.0

    def close(self) -> None:
        """Give all places back."""
        self._slots.give(list(self._places.values()), self._decoder.stream.record())
        self._places.clear()
        self._loaded.clear()

    def _boxes(self, xy: Int64, size: int) -> list[list[int]]:
        """The source tiles under each asked one."""
        first, last = touched(self._facts, xy, size)
        across = self._facts.grid[0]
        return [
            [y * across + x for y in range(y0, y1 + 1) for x in range(x0, x1 + 1)]
            for (x0, y0), (x1, y1) in zip(first.tolist(), last.tolist(), strict=True)
        ]

    def _parts(self, boxes: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """Asked tiles, first and last, whose source tiles all have a place at once."""
        start, together = 0, set[int]()
        for n, box in enumerate(boxes):
            if len(together | set(box)) > self._most:
                yield start, n
                start, together = n, set()
            together |= set(box)
        if boxes:
            yield start, len(boxes)

    def _load(self, number: int) -> _Loaded:
        facts = self._facts
        if facts.counts[number]:
            data, look = self._reader.data(self._level, number)
            if look == Look.WHOLE and not self._odd_on_device(data):
                return _Loaded(data)
            if look == Look.BROKEN:
                return _Loaded(status=TileStatus.CORRUPT)
        # of no bytes, which is background, or legal but rare
        (tile,) = self._reader.decode(self._level, [number], [])
        return _Loaded(pixels=tile.pixels, status=tile.status)

    def _odd_on_device(self, data: bytes) -> bool:
        """Whether RGB that is taken as it is would come in planes of different size."""
        facts = self._facts
        return facts.compression == JPEG and not facts.ycbcr and is_subsampled(data)

    def _fetch(self, needed: Sequence[int]) -> None:
        """Bring source tiles to the device: in one call what it decodes."""
        new = [n for n in needed if n not in self._places and n not in self._bad]
        self._make_room(len(new), set(needed))
        todo: list[tuple[int, bytes]] = []
        for number in new:
            with self._lock:
                loaded = self._loaded.pop(number, None)
            if loaded is None:  # not there yet, or dropped for others meanwhile
                loaded = self._load(number)
            if loaded.data:
                todo.append((number, loaded.data))
            else:
                self._put(number, loaded)
        if not todo:
            return
        places, done = self._decode([data for _, data in todo])
        refused = []
        for (number, _), place, well in zip(todo, places, done, strict=True):
            if well:
                self._places[number] = place
            else:
                refused.append((number, place))
        self._slots.give([place for _, place in refused], self._decoder.stream.record())
        for number, _ in refused:
            (tile,) = self._reader.decode(self._level, [number], [])
            self._put(number, _Loaded(pixels=tile.pixels, status=tile.status))

    def _decode(self, data: Sequence[bytes]) -> tuple[list[int], list[bool]]:
        """Places that are taken for tiles, and whether each is decoded there."""
        places = self._slots.take(len(data))
        try:
            return places, self._decoder.decode(self._facts, data, self._slots, places)
        except BaseException:  # the slide's end; the next one needs its places
            self._slots.give(places, self._decoder.stream.record())
            raise

    def _put(self, number: int, loaded: _Loaded) -> None:
        """Keep a tile's status, and its pixels where a CPU has decoded them."""
        if loaded.pixels is None:
            self._bad[number] = loaded.status
        elif not self._facts.counts[number]:
            self._places[number] = 0
        else:
            (self._places[number],) = places = self._slots.take(1)
            self._decoder.put(loaded.pixels, self._slots, places[0])
            self.on_cpu += 1

    def _make_room(self, count: int, kept: set[int]) -> None:
        """Drop the oldest tiles that are not needed now; they are decoded again when they are."""
        over = len(self._places) + count - self._most
        if over > 0:
            self._drop([n for n in self._places if n not in kept][:over])

    def _release(self, boxes: Sequence[Sequence[int]]) -> None:
        """Count uses down, and drop the tiles that nobody wants any more."""
        numbers = np.array([n for box in boxes for n in box], np.int64)
        np.subtract.at(self._uses, numbers, 1)
        self._drop(
            [n for n in dict.fromkeys(numbers.tolist()) if self._uses[n] <= 0 and n in self._places]
        )

    def _drop(self, numbers: Sequence[int]) -> None:
        places = [self._places.pop(number) for number in numbers]
        self._slots.give([place for place in places if place], self._decoder.stream.record())

    def _cut(
        self, xy: Int64, size: int, boxes: Sequence[Sequence[int]], status: UInt8, out: Tensor
    ) -> None:
        """Put asked tiles together from the places of their source tiles, in one gather."""
        (tile_w, tile_h), (wide, high) = self._facts.tile, self._facts.size
        across, device = self._facts.grid[0], out.device
        sides = np.array([tile_w, tile_h])
        base = np.floor_divide(xy, sides)
        k = np.floor_divide(xy + size - 1, sides) - base + 1
        most_x, most_y = (int(n) for n in k.max(0)) if len(k) else (1, 1)
        places = np.zeros((len(xy), most_y, most_x), np.int64)  # 0 is white
        for i, box in enumerate(boxes):
            if not status[i]:
                for n in box:
                    y, x = divmod(n, across)
                    places[i, y - base[i, 1], x - base[i, 0]] = self._places[n]
        slab, where = self._slots.pixels, torch.from_numpy(places).to(device, non_blocking=True)
        inside = (xy >= 0).all() and (xy + size <= (wide, high)).all()
        if inside and (tile_w, tile_h) == (size, size) and not (xy % size).any():
            rows = slab.view(len(slab), -1)
            torch.index_select(rows, 0, where.view(-1), out=out.view(len(out), -1))
            return
        corner = torch.from_numpy(xy).to(device, non_blocking=True)
        origin = torch.from_numpy(xy - base * sides).to(device, non_blocking=True)
        steps = torch.arange(size, device=device)
        px, py = (origin[:, axis, None] + steps for axis in (0, 1))  # [n, size], from the base on
        at_x, at_y = (corner[:, axis, None] + steps for axis in (0, 1))
        in_x, in_y = ((at >= 0) & (at < most) for at, most in ((at_x, wide), (at_y, high)))
        rows, columns = (py // tile_h)[:, :, None], (px // tile_w)[:, None, :]
        number = torch.arange(len(xy), device=device)[:, None, None]
        place = where[number, rows, columns] * (in_y[:, :, None] & in_x[:, None, :])
        out.copy_(slab[place, (py % tile_h)[:, :, None], (px % tile_w)[:, None, :]])
