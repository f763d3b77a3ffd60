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
    """A decoder of whole source tiles, for several threads at once.

    Attributes:
        at_once: Asked tiles whose source tiles are best decoded together.
    """

    at_once: int

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

    at_once = 1

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
    """JPEG and JPEG 2000 tiles by nvImageCodec, each thread with a decoder of its own.

    On a CPU its pixels are OpenSlide's, bit for bit; on a GPU they are not.
    """

    def __init__(self, facts: TiffFacts, device: int | None = None) -> None:
        """Load the library.

        Args:
            facts: The file's levels.
            device: CUDA device that decodes; None for the CPU.

        Raises:
            Unsuited: It is not installed, or is not for this file.
        """
        tiled_rgb(facts, (JPEG, JPEG2000_RGB))
        # both print a line per odd tile; the tile's status says it once
        os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
        os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
        try:
            from nvidia import nvimgcodec
        except ImportError:
            raise Unsuited("not installed") from None
        self._codec = nvimgcodec
        self._levels = facts.levels
        self._device = device
        self._idle: list[Any] = []  # append and pop are atomic
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=False)
        # on a CPU one tile after another stays in its cache; a GPU wants many
        self.at_once = 1 if device is None else 64
        self._idle.append(self._decoder())

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
            decoder = self._decoder()
        try:
            if self._device is None:
                images = [self._on_cpu(decoder, stream, spare) for stream in streams]
            else:
                images = decoder.decode(streams, params=self._params)
                images = [image and image.cpu() for image in images]
        finally:
            self._idle.append(decoder)
        shape = (facts.tile[1], facts.tile[0], 3)
        made = [(None if image is None else np.asarray(image), image) for image in images]
        return [
            Decoded(pixels, image if self._device is None else None)
            if pixels is not None and pixels.shape == shape and pixels.dtype == np.uint8
            else Decoded(None)
            for pixels, image in made
        ]

    def close(self) -> None:
        """Free the decoders."""
        self._idle.clear()

    def _on_cpu(self, decoder: Any, stream: Any, spare: list[Any]) -> Any:
        try:
            image = spare.pop()
        except IndexError:
            image = None
        return decoder.decode(stream, image=image, params=self._params)

    def _decoder(self) -> Any:
        codec = self._codec
        if self._device is None:
            backends = [codec.Backend(codec.BackendKind.CPU_ONLY)]
            return codec.Decoder(
                device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
                max_num_cpu_threads=1,
                backends=backends,
            )
        try:
            # CUDA leaves the Huffman decoding of small images to the host unless told otherwise
            return codec.Decoder(
                device_id=self._device,
                options=":fancy_upsampling=1 nvjpeg_cuda_decoder:hybrid_huffman_threshold=0",
            )
        except RuntimeError as error:
            raise Unsuited(" ".join(str(error).split())) from None
