"""Choose, once for a store, which codecs a GPU decodes.

All constants stand here. The rates of a CPU are those of bench/results/2026-11-22-cpu-2-cores.md.
No GPU has been measured, so the rule is an estimate: a GPU decodes what the CPU's cores could not
decode fast enough for the encoder.
"""

from collections.abc import Sequence

import torch

from hmil_fast.errors import UsageError
from hmil_fast.extraction.encoders import Encoder
from hmil_fast.extraction.pipeline.extractor import gpu_decoder
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.slide.base import cpus
from hmil_fast.io.tiles.grid import GPU_CODECS

DECODE = ("auto", "cpu", "gpu")
CPU_TILES_PER_S = {"jpeg": 5_400, "jpeg2000": 630}  # of 256 px, a core
ALWAYS = ("jpeg2000",)  # six cores would feed what one feeds with JPEG
SPARE = 1.5  # cores also open slides and write features
# of a multiprocessor and clock, dense in half precision, by compute capability × 10
_FLOP_PER_CLOCK = {80: 2048, 86: 1024, 89: 1024, 90: 4096, 100: 8192, 103: 8192, 120: 1024}
_CLOCK = 1.6e9
_REACHED = 0.45  # of that by a ViT-L


def chosen_codecs(
    decode: str,
    tasks: Sequence[SlideTask],
    encoder: Encoder,
    devices: Sequence[str],
    stored: Sequence[str] | None,
) -> tuple[str, ...]:
    """The codecs, of `GPU_CODECS`, whose tiles a GPU decodes for this store.

    Args:
        decode: One of `DECODE`; "auto" keeps to what the store says.
        tasks: The slides.
        encoder: The encoder, on any device.
        devices: Where it will run, a name a worker.
        stored: What a store that is there says; None for a new one.

    Raises:
        UsageError: `decode` is unknown, or a GPU is to decode and --reader names a CPU reader.
    """
    if decode not in DECODE:
        raise UsageError(f"decode is {decode!r}", f"choose one of {', '.join(DECODE)}")
    if decode == "auto":
        named = any(task.reader is not None for task in tasks)
        chosen = tuple(stored) if stored is not None else () if named else _rule(encoder, devices)
    else:
        chosen = GPU_CODECS if decode == "gpu" else ()
    if chosen and (names := sorted({task.reader for task in tasks if task.reader is not None})):
        raise UsageError(
            f"a GPU decodes this store's slides, but the CPU reader {names[0]!r} was asked for",
            "leave out --reader and --strict-tiles, or make a new --store with --decode cpu",
        )
    return chosen


def _rule(encoder: Encoder, devices: Sequence[str]) -> tuple[str, ...]:
    """What "auto" means for a new store."""
    if not devices[0].startswith("cuda") or not torch.cuda.is_available():
        return ()
    device = torch.device(devices[0])
    try:
        gpu_decoder(device)
    except UsageError:
        return ()
    gpu = torch.cuda.get_device_properties(device)
    return by_rates(
        cores=cpus() / len(devices),
        tiles_per_s=encoder_rate(encoder, gpu.multi_processor_count, 10 * gpu.major + gpu.minor),
    )


def by_rates(cores: float, tiles_per_s: float) -> tuple[str, ...]:
    """The codecs that a GPU decodes beside an encoder of so many tiles/s, with so many cores."""
    return tuple(
        codec
        for codec in GPU_CODECS
        if codec in ALWAYS or cores * CPU_TILES_PER_S[codec] < SPARE * tiles_per_s
    )


def encoder_rate(encoder: Encoder, multiprocessors: int, capability: int) -> float:
    """Tiles/s that a GPU can be expected to encode: by its peak, not by a clock."""
    known = [arch for arch in _FLOP_PER_CLOCK if arch <= capability]
    peak = multiprocessors * _CLOCK * _FLOP_PER_CLOCK[max(known, default=86)]
    return _REACHED * peak / encoder.tile_flop()
