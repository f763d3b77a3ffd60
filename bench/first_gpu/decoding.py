"""Measure decoders: pixels against the CPU's, rates, and whether a write waits for its stream."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from bench.first_gpu.inputs import J2K, ROOT
from bench.first_gpu.journal import device, dry, folder, say, wait
from hmil_fast.io.slide import open_slide
from hmil_fast.io.slide.device_decoder import JPEG_KINDS, DeviceDecoder
from hmil_fast.io.slide.jpeg_check import Look
from hmil_fast.io.slide.sources import Unsuited
from hmil_fast.io.slide.tiled_reader import TiledReader
from hmil_fast.io.tiles.transform import build_transform

RGB = ROOT / "tests" / "data" / "CMU-1-Small-Region.svs"
BATCHES = (64, 256, 512)


def _files() -> dict[str, Path]:
    return {
        "jpeg ycbcr 4:2:0": folder() / "jpeg.tif",
        "jpeg rgb": RGB,
        "jpeg2000": folder() / "jpeg2000.tif",
    }


def pixels() -> None:
    """Difference of both decoders' pixels in grey levels, by kind of decoder and file."""
    for decoder in _decoders():
        _pixels(decoder)


def _decoders() -> list[DeviceDecoder]:
    """Those of JPEG by the engine and by CUDA; both decode JPEG 2000 alike."""
    if dry():
        return [DeviceDecoder(device())]
    found = []
    for name, _ in JPEG_KINDS:
        try:
            found.append(DeviceDecoder(device(), name))
        except Unsuited as why:
            say("decoder", name=name, missing=str(why))
    return found


def _pixels(decoder: DeviceDecoder) -> None:
    for name, path in {**_files(), "jpeg2000": J2K}.items():
        with open_slide(path) as slide:
            assert isinstance(slide, TiledReader)
            numbers, data = whole(slide, 16 if dry() else 128)
            cpu = [tile.pixels for tile in slide.decode(0, numbers, [])]
            slots = decoder.slots(slide.facts(0).tile)
            places = slots.take(len(numbers))
            done = decoder.decode(slide.facts(0), data, slots, places)
            wait()
            ours = slots.pixels[places].cpu().numpy().astype(int)
            slots.give(places, decoder.stream.record())
        apart = [
            np.abs(a[: b.shape[0], : b.shape[1]] - b)
            for a, b, well in zip(ours, cpu, done, strict=True)
            if well and b is not None
        ]
        flat = np.concatenate([each.ravel() for each in apart]) if apart else np.zeros(1)
        say(
            "pixels", by=decoder.names()[-1], file=name, tiles=len(done), refused=done.count(False),
            mean=float(flat.mean()), most=int(flat.max()), over_2=float((flat > 2).mean()),
        )  # fmt: skip


def rates() -> None:
    """Tiles of 256 px a second: the device's by batch, a CPU's by threads."""
    for codec, path in (("jpeg", folder() / "jpeg.tif"), ("jpeg2000", folder() / "jpeg2000.tif")):
        with open_slide(path) as slide:
            assert isinstance(slide, TiledReader)
            most = 32 if dry() else 4096 if codec == "jpeg" else 2048
            numbers, data = whole(slide, most)
            for decoder in _decoders():
                for batch in (32,) if dry() else BATCHES:
                    say(
                        "rate", codec=codec, on="device", by=decoder.names()[-1], batch=batch,
                        tiles_per_s=_device_rate(decoder, slide, data, batch),
                    )  # fmt: skip
            for threads in (1, 2) if dry() else (1, 8, 16):
                say("rate", codec=codec, on="cpu", threads=threads,
                    tiles_per_s=_cpu_rate(slide, numbers, threads))  # fmt: skip


def _device_rate(
    decoder: DeviceDecoder, slide: TiledReader, data: Sequence[bytes], batch: int
) -> float:
    slots, facts = decoder.slots(slide.facts(0).tile), slide.facts(0)
    places = slots.take(batch)
    parts = [data[k : k + batch] for k in range(0, len(data) - batch + 1, batch)]
    decoder.decode(facts, parts[0], slots, places)
    wait()
    began = time.perf_counter()
    for part in parts:
        decoder.decode(facts, part, slots, places)
        decoder.stream.record().synchronize()
    rate = len(parts) * batch / (time.perf_counter() - began)
    slots.give(places, decoder.stream.record())
    return rate


def _cpu_rate(slide: TiledReader, numbers: Sequence[int], threads: int) -> float:
    with ThreadPoolExecutor(threads) as pool:

        def work(k: int) -> None:
            spare: list[object] = []
            for number in numbers[k::threads]:
                (tile,) = slide.decode(0, [number], spare)
                spare = [tile.buffer] if tile.buffer is not None else []

        began = time.perf_counter()
        list(pool.map(work, range(threads)))
        return len(numbers) / (time.perf_counter() - began)


def order() -> None:
    """Whether a decoder writes before its stream's turn: then only a wait of the host helps."""
    if dry():
        say("order", needs="a GPU")
        return
    decoder = DeviceDecoder(device())
    for codec, path in (("jpeg", folder() / "jpeg.tif"), ("jpeg2000", folder() / "jpeg2000.tif")):
        with open_slide(path) as slide:
            assert isinstance(slide, TiledReader)
            _, data = whole(slide, 64)
            slots = decoder.slots(slide.facts(0).tile)
            places, early = slots.take(64), 0
            for _ in range(10):
                with decoder.stream.use():
                    slots.pixels[places] = 7
                    torch.cuda._sleep(200_000_000)
                    seen = slots.pixels[places].long().sum()
                decoder.decode(slide.facts(0), data, slots, places)
                wait()
                early += int(seen) != 7 * 64 * 256 * 256 * 3
            slots.give(places, decoder.stream.record())
        say("order", codec=codec, written_before_its_turn=early, of=10)


def transform() -> None:
    """Whether an output outlives the next call, and the rate, of DALI and of torch."""
    tiles = [np.random.default_rng(k).integers(0, 256, (64, 256, 256, 3), np.uint8)
             for k in range(2 if dry() else 12)]  # fmt: skip
    rates = {}
    for backend in ("dali", "torch"):
        made = build_transform(
            read_px=256, input_px=256, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear",
            batch=64, device=device(), backend=backend,
        )  # fmt: skip
        there = [torch.from_numpy(t).to(device()) for t in tiles]
        want = [made(t).clone() for t in there]
        kept = torch.empty(len(tiles), *want[0].shape, device=device())
        wait()
        for place, part in zip(kept, there, strict=True):
            if not dry():
                torch.cuda._sleep(100_000_000)
            place.copy_(made(part))
        wait()
        wrong = [k for k, (a, b) in enumerate(zip(kept, want, strict=True)) if not a.equal(b)]
        began = time.perf_counter()
        for _ in range(1 if dry() else 5):
            for part in there:
                made(part)
        wait()
        rates[backend] = (1 if dry() else 5) * len(tiles) * 64 / (time.perf_counter() - began)
        say("transform", backend=backend, batches_overwritten=wrong, tiles_per_s=rates[backend])


def whole(slide: TiledReader, most: int) -> tuple[list[int], list[bytes]]:
    """Numbers and bytes of tiles that any decoder reads."""
    found = [
        (number, data)
        for number in range(min(most, len(slide.facts(0).offsets)))
        for data, look in [slide.data(0, number)]
        if look == Look.WHOLE
    ]
    return [number for number, _ in found], [data for _, data in found]
