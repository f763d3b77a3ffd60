"""The extraction job: slides in, features in the store, one bad slide never stopping the others."""

import io
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hmil_fast.errors import HmilError, SlideError
from hmil_fast.extraction.encoders import Encoder, first_line
from hmil_fast.extraction.plan import SlideTask
from hmil_fast.io.slide import SlideReader, open_slide, require_mpp
from hmil_fast.io.store import FeatureStore, StoreSpec, slide_dirname
from hmil_fast.io.tiles.decode import DecodeStats, decode_tiles
from hmil_fast.io.tiles.grid import TileGrid, TileSpec, plan_grid
from hmil_fast.io.tiles.tissue import THUMBNAIL_PX, TissueMask, find_tissue, overlay
from hmil_fast.io.tiles.transform import TileTransform, build_transform

STORED_THUMBNAIL_PX = 1024
MAX_BAD_SHARE = 0.1  # a slide with more undecodable tiles is refused


@dataclass
class Timings:
    """Wall seconds a job spent per stage; `decode` is the threads' own time beside the others."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def measure(self, stage: str, since: float) -> float:
        """Add the time since `since` to a stage and return the time now."""
        now = time.perf_counter()
        self.seconds[stage] += now - since
        return now


@dataclass(frozen=True)
class SlideResult:
    """What became of one slide; `error` is None where its features are in the store."""

    slide_id: str
    num_tiles: int = 0
    bad_tiles: int = 0
    seconds: float = 0.0
    note: str | None = None
    error: HmilError | None = None


@dataclass(frozen=True)
class Prepared:
    """An open slide with its tissue and its grid."""

    task: SlideTask
    reader: SlideReader
    thumbnail: NDArray[np.uint8]
    tissue: TissueMask
    grid: TileGrid


def prepare_slide(task: SlideTask, spec: TileSpec) -> Prepared:
    """Open a slide, find its tissue and lay its grid.

    Raises:
        SlideError: The slide cannot be opened, states no usable mpp, or has no level fine enough.
    """
    try:
        str(task.path).encode()
    except UnicodeEncodeError:
        raise SlideError(f"the name of {task.path} is not UTF-8", "rename the file") from None
    reader = open_slide(task.path, mpp=task.mpp, fallback_mpp=task.fallback_mpp)
    try:
        require_mpp(reader.info)
        thumbnail = reader.thumbnail(THUMBNAIL_PX)
        width = reader.info.level_dimensions[0][0]
        tissue = find_tissue(thumbnail, reader.info.level_mpp(0) * width / thumbnail.shape[1])
        return Prepared(task, reader, thumbnail, tissue, plan_grid(reader.info, spec, tissue))
    except BaseException:
        reader.close()
        raise


class Extractor:
    """A warm encoder with its store; it takes slide after slide.

    Args:
        store: Where features go.
        encoder: What makes them.
        spec: The tiles asked for.
        batch: Tiles a forward pass.
        threads: Threads that decode.
    """

    def __init__(
        self,
        store: FeatureStore,
        encoder: Encoder,
        spec: TileSpec,
        *,
        batch: int = 64,
        threads: int | None = None,
    ) -> None:
        self.store = store
        self.encoder = encoder
        self.spec = spec
        self.batch = batch
        self.threads = threads or max(2, min(16, cpus()))
        self.timings = Timings()
        self._transforms: dict[int, TileTransform] = {}

    def run(
        self, tasks: Sequence[SlideTask], on_tiles: Callable[[SlideTask, int, int], None]
    ) -> Iterator[SlideResult]:
        """Extract slides in order, opening the next one while this one is encoded.

        Args:
            tasks: What to extract.
            on_tiles: Called after every batch with the slide, its tiles done and its tiles in all.

        Returns:
            One result a slide, also for those that failed.
        """
        left = iter(tasks)
        return self.run_from(lambda ahead: next(left, None), on_tiles)

    def run_from(
        self,
        take: Callable[[bool], SlideTask | None],
        on_tiles: Callable[[SlideTask, int, int], None],
    ) -> Iterator[SlideResult]:
        """Extract slides until none is left, as `run` does.

        Args:
            take: Gives the next slide. With True it is to be opened ahead: asked for late in a long
                slide, so that of two processes none keeps a slide waiting that the other could do.
            on_tiles: As of `run`.

        Yields:
            One result a slide.
        """
        ahead: tuple[SlideTask, Future[Prepared]] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="open-slide") as opener:

            def open_slide(early: bool) -> tuple[SlideTask, Future[Prepared]] | None:
                task = take(early)
                if task is None:
                    return None
                return task, opener.submit(prepare_slide, task, self.spec)

            try:
                while current := ahead or open_slide(False):
                    ahead, asked = None, False

                    def progress(task: SlideTask, done: int, total: int) -> None:
                        nonlocal ahead, asked
                        if not asked and total - done <= max(total // 4, 4 * self.batch):
                            ahead, asked = open_slide(True), True
                        if done:
                            on_tiles(task, done, total)

                    start = time.perf_counter()
                    yield self._guarded(current[0], current[1].result, start, progress)
            finally:
                if ahead is not None and not ahead[1].cancel() and ahead[1].exception() is None:
                    ahead[1].result().reader.close()

    def _guarded(
        self,
        task: SlideTask,
        prepared: Callable[[], Prepared],
        start: float,
        on_tiles: Callable[[SlideTask, int, int], None],
    ) -> SlideResult:
        """One slide's result, whatever happened to it; only a stop by the user passes through."""
        try:
            ready = prepared()
            self.timings.measure("open", start)
            with ready.reader:
                return self._extract(ready, start, on_tiles)
        except HmilError as error:
            return SlideResult(task.slide_id, error=error)
        except (MemoryError, torch.OutOfMemoryError):
            what = f"slide {task.path}: out of memory with batches of {self.batch} tiles"
            fix = "run the same command with a smaller --batch"
            return SlideResult(task.slide_id, error=SlideError(what, fix))
        except OSError as error:
            what = f"slide {task.path}: {error}"
            fix = "check the disks of the slide and of the store; then run the same command again"
            return SlideResult(task.slide_id, error=SlideError(what, fix))
        except Exception as error:  # noqa: BLE001  # the other slides of the job go on
            what = f"slide {task.path}: {first_line(error)}"
            fix = "look at the slide with `hmil-fast doctor`; if it is sound, report this as a bug"
            return SlideResult(task.slide_id, error=SlideError(what, fix))

    def _extract(
        self, ready: Prepared, start: float, on_tiles: Callable[[SlideTask, int, int], None]
    ) -> SlideResult:
        task, grid, n = ready.task, ready.grid, len(ready.grid.coords)
        transform = self._transform(grid.read_px)
        status = np.zeros(n, np.uint8)
        stats = DecodeStats()
        decoder = decode_tiles(
            ready.reader, grid, batch=self.batch, threads=self.threads, stats=stats
        )
        # closed whatever happens: its threads read the slide, which is closed next
        with (
            closing(decoder) as tiles,
            self.store.writer(task.slide_id, n, self._attributes(ready)) as writer,
        ):
            on_tiles(task, 0, n)
            now = time.perf_counter()
            pending: torch.Tensor | None = None
            for tile_batch in tiles:
                now = self.timings.measure("wait for tiles", now)
                rows = slice(tile_batch.rows, tile_batch.rows + len(tile_batch.pixels))
                status[rows] = tile_batch.status
                x = transform(tile_batch.pixels)
                tile_batch.release()
                now = self.timings.measure("transform", now)
                features = self.encoder(x)
                now = self.timings.measure("encode", now)
                # on a GPU the batch before is copied back and written while this one is encoded
                if pending is not None:
                    now = self._write(writer.append, pending, now)
                pending = features
                on_tiles(task, rows.stop, n)
            if pending is not None:
                self._write(writer.append, pending, now)
            bad = int(np.count_nonzero(status))
            if bad > MAX_BAD_SHARE * n:
                raise SlideError(
                    f"slide {task.path}: {bad} of {n} tiles cannot be decoded",
                    "copy the file again from its source, or leave it out",
                )
            now = time.perf_counter()
            self._save_overlay(ready)  # before the commit: a stored slide never counts as failed
            writer.commit(grid.coords, status, {"thumbnail.jpg": _jpeg(ready.thumbnail)})
            self.timings.measure("commit", now)
        self.timings.seconds["decode (threads)"] += stats.busy_s
        seconds = time.perf_counter() - start
        return SlideResult(task.slide_id, n, bad, seconds, ready.tissue.note)

    def _write(
        self, append: Callable[[NDArray[Any]], None], features: torch.Tensor, now: float
    ) -> float:
        dtype = self.store.spec.dtype
        with np.errstate(over="ignore"):
            rows = features.cpu().numpy().astype(dtype)
        if not np.isfinite(rows).all():
            raise SlideError(
                f"features of encoder {self.encoder.card.name!r} are not finite in {dtype}",
                "extract into a new --store with --dtype float32, or check the --weights",
            )
        now = self.timings.measure("encode", now)
        append(rows)
        return self.timings.measure("write", now)

    def _transform(self, read_px: int) -> TileTransform:
        if read_px not in self._transforms:
            card = self.encoder.card
            self._transforms[read_px] = build_transform(
                read_px=read_px,
                input_px=card.resize_px,
                mean=card.mean,
                std=card.std,
                interpolation=card.interpolation,
                batch=self.batch,
                device=self.encoder.device,
            )
        return self._transforms[read_px]

    def _attributes(self, ready: Prepared) -> dict[str, Any]:
        info, grid = ready.reader.info, ready.grid
        return {
            "source": {"file": info.path.name, "bytes": info.path.stat().st_size},
            "reader": info.reader,
            "codec": info.codec,
            "level0_size": list(info.level_dimensions[0]),
            "mpp": {
                "level0": grid.slide_mpp,
                "source": info.mpp_source,
                "requested": grid.mpp_requested,
                "read": grid.mpp_read,
                "effective": grid.mpp_effective,
            },
            "level": grid.level,
            "tile_px": grid.tile_px,
            "read_px": grid.read_px,
            "tile_px_level0": grid.tile_px_level0,
            "coords_convention": "level0_px_topleft_xy",
            "order": "raster",
            "tissue_note": ready.tissue.note,
            "precision": self.encoder.precision,
            "software": {name: version(name) for name in ("hmil-fast", "torch", "timm", "zarr")},
        }

    def _save_overlay(self, ready: Prepared) -> None:
        folder = self.store.path / "overlays"
        folder.mkdir(exist_ok=True)
        picture = overlay(ready.thumbnail, ready.tissue, ready.grid, ready.reader.info)
        name = f"{slide_dirname(ready.task.slide_id)}.png"
        picture.save(folder / name, compress_level=1)  # half the time, a tenth more bytes


def cpus() -> int:
    """CPUs that this process may use, which a scheduler may have made fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 2


def store_spec(encoder: Encoder, spec: TileSpec, dtype: str) -> StoreSpec:
    """What every slide of a store made with this encoder and these tiles shares."""
    return StoreSpec(encoder.card.dim, dtype, encoder.describe(), spec.to_dict())


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer, picture = io.BytesIO(), Image.fromarray(pixels)
    picture.thumbnail((STORED_THUMBNAIL_PX, STORED_THUMBNAIL_PX))
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
