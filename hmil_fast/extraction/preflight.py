"""Estimate tiles, bytes and time of a job from some of its slides, and check free disk space."""

import math
import queue
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from hmil_fast.errors import StoreError
from hmil_fast.extraction.encoders import Encoder
from hmil_fast.extraction.prepare import prepare_slide
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.location import Location
from hmil_fast.io.tiles.grid import TileSpec

SAMPLE = 16
LOOK_SECONDS = 3.0
_THREADS = 4
_ROOM = 1.1  # the estimate is one, and other jobs write too
_SLIDE_BYTES = 400_000  # pictures and records beside the features
_ELSEWHERE = frozenset({".mrxs", ".vms", ".vmu", ".dcm"})  # whose pixels lie in other files


@dataclass(frozen=True)
class Estimate:
    """What a job will be.

    Attributes:
        slides: Of the job.
        sampled: Slides that were looked at.
        unusable: Those among them that cannot be extracted.
        tiles: Expected tiles of all slides.
        bytes: Expected size of the store.
        seconds: Expected time; None where nobody can tell.
    """

    slides: int
    sampled: int
    unusable: int
    tiles: int
    bytes: int
    seconds: float | None

    def __str__(self) -> str:
        hours = "" if self.seconds is None else f", {_duration(self.seconds)}"
        bad = f", of which {self.unusable} cannot be used" if self.unusable else ""
        return (
            f"about {self.tiles:,} tiles, {nbytes(self.bytes)}{hours} for {self.slides:,} slides, "
            f"by {self.sampled} of them{bad}"
        )


def sample(tasks: Sequence[SlideTask]) -> list[SlideTask]:
    """Up to 16 slides, evenly from the smallest to the largest file."""
    order = sorted(tasks, key=lambda task: task.file_bytes)
    count = min(SAMPLE, len(order))
    return [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]


def look(tasks: Sequence[SlideTask], spec: TileSpec) -> dict[str, int | None]:
    """Tiles of slides by id, None where one is unusable; those that a few seconds suffice for."""
    todo: queue.SimpleQueue[SlideTask] = queue.SimpleQueue()
    tile_counts: dict[str, int | None] = {}
    for task in tasks:
        todo.put(task)
    until = time.monotonic() + LOOK_SECONDS

    def in_time(share: float, px: int) -> None:
        if time.monotonic() > until:
            raise TimeoutError

    def work() -> None:
        while time.monotonic() < until:
            try:
                task = todo.get_nowait()
            except queue.Empty:
                return
            tiles: int | None = None
            try:
                ready = prepare_slide(task, spec, in_time)
                with ready.reader:
                    tiles = sum(len(grid.coords) for grid in ready.grids)
            except TimeoutError:
                return
            except Exception:  # noqa: BLE001  # the job will say why
                tiles = None
            tile_counts[task.slide_id] = tiles

    # not joined beyond the time: a slide that hangs keeps no job from its start, or from its end
    threads = [threading.Thread(target=work, daemon=True) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(tile_counts)


def estimate(
    tasks: Sequence[SlideTask],
    tiles: Mapping[str, int | None],
    tile_bytes: int,
    tile_seconds: float | None,
) -> Estimate:
    """A job's size from that of some of its slides.

    Tiles go by the bytes of the file, apart for each suffix, since codecs differ; where the pixels
    lie in other files, by the slide.

    Args:
        tasks: The slides of the job.
        tiles: Of some of them, by id; None where a slide cannot be used.
        tile_bytes: In the store.
        tile_seconds: To encode; None if unknown.
    """

    def weight(task: SlideTask) -> int:
        return 1 if task.path.suffix.lower() in _ELSEWHERE else task.file_bytes

    known: dict[str, tuple[int, int]] = {}
    for task in tasks:
        if task.slide_id in tiles:
            for kind in ("", task.path.suffix.lower()):
                of, by = known.get(kind, (0, 0))
                known[kind] = (of + (tiles[task.slide_id] or 0), by + weight(task))
    total = 0.0
    for task in tasks:
        of, by = known.get(task.path.suffix.lower()) or known.get("", (0, 0))
        total += weight(task) * of / max(by, 1)
    count = math.ceil(total)
    return Estimate(
        len(tasks),
        len(tiles),
        sum(tile_counts is None for tile_counts in tiles.values()),
        count,
        count * tile_bytes + len(tasks) * _SLIDE_BYTES,
        None if tile_seconds is None else count * tile_seconds,
    )


def tile_bytes(spec: TileSpec, dim: int, dtype: str) -> int:
    """Bytes that a tile takes in a store, with its coordinates and status."""
    return dim * (4 if dtype == "float32" else 2) * (1 + spec.views) + 9


def tile_seconds(encoder: Encoder) -> float:
    """Seconds a tile of an encoder here; a large one on a CPU is asked for one tile only."""
    device, px = encoder.device, encoder.card.resize_px
    spent = math.inf
    for count in (1, 64 if device.type == "cuda" else 8):
        tiles = torch.zeros(count, 3, px, px, device=device)
        start = time.perf_counter()
        encoder(tiles).cpu()
        spent = (time.perf_counter() - start) / count
        if spent > 0.5 and device.type == "cpu":
            break
    return spent


def require_space(expected: Estimate, store: Location) -> str:
    """The free space of the store's disk, in words; "" where there is no such thing.

    Raises:
        StoreError: The disk is too small.
    """
    free = backend_of(store).free_bytes(store)
    if free is None:
        return ""
    if expected.bytes * _ROOM > free:
        raise StoreError(
            f"the job needs about {nbytes(expected.bytes)} ({expected}), the disk of {store} has "
            f"{nbytes(free)} free",
            "free some, give a --store on a larger disk, or --no-preflight to start anyway",
        )
    return f"; {nbytes(free)} free"


def preflight(
    tasks: Sequence[SlideTask],
    done: Collection[str],
    spec: TileSpec,
    about: tuple[int, str],
    encoder: Encoder | None,
    store: Location,
) -> str | None:
    """What the job will be, in words, within a few seconds; None for a job of a few slides.

    Args:
        tasks: Its slides.
        done: Those that are in the store.
        spec: The tiles asked for.
        about: Length and dtype of the features.
        encoder: Where it runs here, to be timed.
        store: Where they go.

    Raises:
        StoreError: The disk is too small for the job.
    """
    todo = [task for task in tasks if task.slide_id not in done]
    if len(todo) < SAMPLE:
        return None
    tile_counts = look(sample(todo), spec)
    if not tile_counts:
        return None
    seconds = None if encoder is None else tile_seconds(encoder)
    expected = estimate(todo, tile_counts, tile_bytes(spec, *about), seconds)
    return f"{expected}{require_space(expected, store)}"


def nbytes(count: float) -> str:
    """A number of bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
