"""Decode a TIFF's tiles: the protocol of a decoder, nvImageCodec's, and raw bytes."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from hmil_fast.io.slide.jpeg_check import full_jpeg, jpeg_tables
from hmil_fast.io.slide.protocol import UInt8
from hmil_fast.io.slide.tiff_facts import CODECS, TiffFacts

JPEG, JPEG2000_RGB, UNCOMPRESSED = 7, 33005, 1
MAX_TILE_PX = 4096 * 4096


class Unsuited(Exception):
    """A source is not to be used for this file, and why."""


class Decoded(NamedTuple):
    """A source tile.

    Attributes:
        pixels: uint8 [h, w, 3], of a tile at the border perhaps only what lies in the level; None
            where the decoder refused it.
        buffer: What may be decoded into once the pixels are no longer wanted, or None.
    """

    pixels: UInt8 | None
    buffer: Any = None


class Source(Protocol):
    """A decoder of whole source tiles, for several threads at once."""

    def decode(
        self, level: int, tiles: Sequence[int], data: Sequence[bytes], spare: list[Any]
    ) -> list[Decoded]:
        """Decode source tiles.

        Args:
            level: Pyramid level.
            tiles: Their numbers in the level's table.
            data: Their bytes, seen to be whole.
            spare: Buffers of this level that it may take.
        """
        ...

    def close(self) -> None:
        """Free the file, if it holds one."""
        ...


def tiled_rgb(facts: TiffFacts, codecs: Sequence[int]) -> None:
    """Check that every level is 8-bit RGB in one of some codecs.

    Raises:
        Unsuited: One is not.
    """
    if facts.vendor not in ("aperio", "generic-tiff"):
        raise Unsuited(f"it does not read {facts.vendor} files")
    if (
        facts.vendor == "aperio"
        and len(facts.levels) > 1
        and not all(level.counts.all() for level in facts.levels)
    ):
        raise Unsuited("tiles without bytes are to be made from finer levels")
    for level in facts.levels:
        if not level.plain_rgb:
            raise Unsuited("not upright 8-bit interleaved RGB")
        if level.compression not in codecs:
            codec = CODECS.get(level.compression, level.compression)
            codec = "uncompressed tiles" if codec == "none" else codec
            colour = " in YCbCr" if level.compression == 33003 else ""
            raise Unsuited(f"it is not trusted with {codec}{colour}")
        if level.ycbcr and level.compression != JPEG:
            raise Unsuited("it is not trusted with YCbCr that is not in JPEG")
        if level.predictor != 1:
            raise Unsuited(f"it is not trusted with predictor {level.predictor}")
        if jpeg_tables(level.tables) is None:
            raise Unsuited("its JPEGTables are not just tables")
        if level.tile[0] * level.tile[1] > MAX_TILE_PX:
            raise Unsuited(f"tiles of {level.tile[0]} × {level.tile[1]} px")


class RawSource:
    """Uncompressed tiles: their bytes are the pixels."""

    def __init__(self, facts: TiffFacts) -> None:
        """See `tiled_rgb`."""
        tiled_rgb(facts, (UNCOMPRESSED,))
        self._levels = facts.levels

    def decode(
        self, level: int, tiles: Sequence[int], data: Sequence[bytes], spare: list[Any]
    ) -> list[Decoded]:
        """See `Source.decode`."""
        wide, high = self._levels[level].tile
        return [Decoded(np.frombuffer(raw, np.uint8).reshape(high, wide, 3)) for raw in data]

    def close(self) -> None:
        """Nothing to free."""


class NvImageCodecSource:
    """JPEG and JPEG 2000 tiles by nvImageCodec on the CPU, each thread with a decoder of its own.

    Its pixels are OpenSlide's, bit for bit. One tile after another: so it stays in a core's cache.
    """

    def __init__(self, facts: TiffFacts) -> None:
        """Load the library.

        Raises:
            Unsuited: It is not installed, or is not for this file.
        """
        tiled_rgb(facts, (JPEG, JPEG2000_RGB))
        self._codec = codec = load_nvimgcodec()
        self._levels = facts.levels
        self._idle = [cpu_decoder(codec)]  # append and pop are atomic
        self._params = codec.DecodeParams(apply_exif_orientation=False)

    def decode(
        self, level: int, tiles: Sequence[int], data: Sequence[bytes], spare: list[Any]
    ) -> list[Decoded]:
        """See `Source.decode`."""
        facts = self._levels[level]
        if facts.compression == JPEG:
            data = [full_jpeg(raw, facts.tables, ycbcr=facts.ycbcr) for raw in data]
        streams = [self._codec.CodeStream(raw) for raw in data]
        try:
            decoder = self._idle.pop()
        except IndexError:
            decoder = cpu_decoder(self._codec)
        try:
            images = [self._decode(decoder, stream, spare) for stream in streams]
        finally:
            self._idle.append(decoder)
        shape = (facts.tile[1], facts.tile[0], 3)
        made = [(None if image is None else np.asarray(image), image) for image in images]
        return [
            Decoded(pixels, image)
            if pixels is not None and pixels.shape == shape and pixels.dtype == np.uint8
            else Decoded(None)
            for pixels, image in made
        ]

    def close(self) -> None:
        """Free the decoders."""
        self._idle.clear()

    def _decode(self, decoder: Any, stream: Any, spare: list[Any]) -> Any:
        try:
            image = spare.pop()
        except IndexError:
            image = None
        return decoder.decode(stream, image=image, params=self._params)


def load_nvimgcodec() -> Any:
    """The library's module.

    Raises:
        Unsuited: It is not installed.
    """
    # both print a line per odd tile; the tile's status says it once
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    try:
        from nvidia import nvimgcodec
    except ImportError:
        raise Unsuited("not installed") from None
    return nvimgcodec


def cpu_decoder(codec: Any) -> Any:
    """A decoder that works in the thread that calls it."""
    return codec.Decoder(
        device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=1,
        backends=[codec.Backend(codec.BackendKind.CPU_ONLY)],
    )
