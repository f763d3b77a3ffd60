"""Extract slides into a store; an error of one slide does not stop the others."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hmil_fast.errors import UsageError
from hmil_fast.extraction.encoders import Encoder
from hmil_fast.extraction.pictures import ContactSheet, save_overlay
from hmil_fast.extraction.pipeline.attributes import jpeg, scale_attributes, slide_attributes
from hmil_fast.extraction.pipeline.batches import StaticBatches, encode_timed
from hmil_fast.extraction.pipeline.feed import Decoded
from hmil_fast.extraction.pipeline.pipeline import Pipeline
from hmil_fast.extraction.pipeline.result import SlideResult
from hmil_fast.extraction.pipeline.slide_job import ActiveSlide
from hmil_fast.extraction.pipeline.timings import Timings
from hmil_fast.extraction.prepare import prepare_slide
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.slide import Progress
from hmil_fast.io.slide.base import cpus
from hmil_fast.io.slide.device_decoder import DeviceDecoder
from hmil_fast.io.slide.sources import Unsuited
from hmil_fast.io.store import FeatureStore, StoreSpec
from hmil_fast.io.tiles.augment import Augmentation, PixelParams, plain_params
from hmil_fast.io.tiles.batch import DecodeStats, TileBatch
from hmil_fast.io.tiles.decode import decode_tiles
from hmil_fast.io.tiles.grid import TileSpec
from hmil_fast.io.tiles.transform import TileTransform, build_transform


class Extractor:
    """A warm encoder with its store; it takes slide after slide.

    Args:
        store: Where features go.
        encoder: What makes them.
        spec: The tiles asked for.
        batch: Tiles a forward pass, always so many: a last batch is filled up. None chooses by
            the memory of the device.
        threads: Threads that decode.
        decoder: Decodes the slides of the codecs that `spec` names; by default one on the GPU of
            the encoder.

    Raises:
        UsageError: The store's slides are to be decoded by a GPU, and none here does.
    """

    def __init__(
        self,
        store: FeatureStore,
        encoder: Encoder,
        spec: TileSpec,
        *,
        batch: int | None = None,
        threads: int | None = None,
        decoder: DeviceDecoder | None = None,
    ) -> None:
        self.store = store
        self.encoder = encoder
        self.spec = spec
        if spec.gpu_decoded and decoder is None:
            decoder = gpu_decoder(encoder.device)
        self.decoder = decoder
        self.batch = encoder.prepare(batch)
        self.threads = threads or max(2, min(16, cpus()))
        self.timings = Timings()
        self._transforms: dict[int, TileTransform] = {}

    def run(
        self, tasks: Sequence[SlideTask], on_tiles: Callable[[SlideTask, int, int], None]
    ) -> Iterator[SlideResult]:
        """Extract slides, opening the next ones while others are encoded.

        Args:
            tasks: What to extract.
            on_tiles: Called after every batch with each slide in it, its tiles done and its tiles
                in all.

        Returns:
            One result a slide, also for those that failed.
        """
        left = iter(tasks)
        return self.run_from(lambda ahead: next(left, None), on_tiles)

    def run_from(
        self,
        take: Callable[[bool], SlideTask | None],
        on_tiles: Callable[[SlideTask, int, int], None],
        on_search: Callable[[SlideTask, float, int], None] = lambda task, share, px: None,
    ) -> Iterator[SlideResult]:
        """Extract slides until none is left, as `run` does.

        Args:
            take: Gives the next slide. With True it is to be opened ahead: asked for late in a long
                slide, so that of two processes none keeps a slide waiting that the other could do.
                With False it may wait: then nothing else of ours is under way.
            on_tiles: As of `run`.
            on_search: Called while the tissue of a slide without small levels is looked for, with
                the share that is done and the px of the level that is read.

        Yields:
            One result a slide.
        """
        batch = StaticBatches(self.batch, self.encoder.card.resize_px, self.encoder.device)
        with closing(Pipeline(self, batch, on_tiles, on_search)) as pipeline:
            yield from pipeline.run(take)

    def open(self, task: SlideTask, progress: Progress) -> ActiveSlide:
        """Open a slide, plan its tiles, draw them, and begin to write."""
        start = time.perf_counter()
        with self.timings.of("open (threads)"):
            ready = prepare_slide(task, self.spec, progress)
            try:
                save_overlay(self.store, ready)
                attributes = slide_attributes(ready, self.encoder.precision, self.encoder.device)
                # last bits of a feature depend on them
                attributes["batch"] = min(self.batch, self.encoder.limit or self.batch)
                attributes["compiled"] = self.encoder.compiled
                files = {"thumbnail.jpg": jpeg(ready.picture)}
                n, *coarser = (len(grid.coords) for grid in ready.grids)
                facts = (scale_attributes(ready, grid) for grid in ready.grids[1:])
                others = list(zip(coarser, facts, strict=True))
                sheet = ContactSheet(self.store, ready)
                writer = self.store.writer(task.slide_id, n, attributes, others)
                return ActiveSlide(ready, writer, files, sheet, start)
            except BaseException:
                ready.reader.close()
                raise

    def decode(self, slide: ActiveSlide, stats: DecodeStats) -> Generator[TileBatch, None, None]:
        """Decode its tiles, on the GPU where the store says so of its codec."""
        by_gpu = slide.reader.info.codec in self.spec.gpu_decoded
        to = self.decoder if by_gpu and self.decoder is not None else self.encoder.device
        return decode_tiles(
            slide.reader,
            slide.grids,
            batch=self.batch,
            threads=self.threads,
            stats=stats,
            to=to,
        )

    def transform(self, decoded: Decoded, part: slice, view: int = 0) -> Tensor:
        """Encoder input [n, 3, resize_px, resize_px] of some of the tiles, in one view of them."""
        read_px = decoded.grid.read_px
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
        params = self._params(decoded, part, view)
        return self._transforms[read_px](decoded.tiles.pixels[part], params=params)

    def _params(self, decoded: Decoded, part: slice, view: int) -> PixelParams | None:
        slide, first = decoded.slide, decoded.tiles.rows
        coords = decoded.grid.coords[first + part.start : first + part.stop]
        if not view:
            return plain_params(len(coords), slide.density)
        return Augmentation().params(
            coords,
            slide_id=slide.task.slide_id,
            view=view,
            seed=self.spec.view_seed,
            density=slide.density,
        )

    def encode(self, tiles: Tensor) -> Callable[[], NDArray[Any]]:
        """Start a batch; the result gives its features when called."""
        return encode_timed(self.encoder, tiles, self.store.spec.dtype, self.timings)


def gpu_decoder(device: torch.device) -> DeviceDecoder:
    """The decoder of a GPU.

    Raises:
        UsageError: It is none, or does not decode.
    """
    fix = "run it where a GPU is, or make a new --store with --decode cpu"
    if device.type != "cuda":
        raise UsageError(f"the store's tiles are to be decoded by a GPU, not on {device}", fix)
    try:
        return DeviceDecoder(device)
    except Unsuited as why:
        package = 'run pip install "hmil-fast[cu13]" (or [cu12]), or make a new --store with '
        raise UsageError(
            f"{device} decodes no tiles: nvImageCodec: {why}", f"{package}--decode cpu"
        ) from None


def store_spec(encoder: Encoder, spec: TileSpec, dtype: str) -> StoreSpec:
    """What every slide of a store made with this encoder and these tiles shares."""
    return StoreSpec(encoder.card.dim, dtype, encoder.describe(), spec.to_dict())
