"""Decode JPEG tiles with libjpeg-turbo; a tile that causes a warning is refused."""

from collections.abc import Sequence
from typing import Any

from hmil_fast.io.slide.jpeg_check import full_jpeg
from hmil_fast.io.slide.sources import JPEG, Decoded, Unsuited, tiled_rgb
from hmil_fast.io.slide.tiff_facts import TiffFacts


class LibjpegSource:
    """JPEG tiles; their pixels are OpenSlide's, bit for bit."""

    def __init__(self, facts: TiffFacts) -> None:
        """Load the library.

        Raises:
            Unsuited: It is not installed, or is not for this file.
        """
        tiled_rgb(facts, (JPEG,))
        try:
            import simplejpeg
        except ImportError:
            raise Unsuited("not installed") from None
        self._decode: Any = simplejpeg.decode_jpeg
        self._levels = facts.levels

    def decode(
        self, level: int, tiles: Sequence[int], data: Sequence[bytes], spare: list[Any]
    ) -> list[Decoded]:
        """See `Source.decode`."""
        facts = self._levels[level]
        return [self._one(full_jpeg(raw, facts.tables, ycbcr=facts.ycbcr), spare) for raw in data]

    def close(self) -> None:
        """Nothing to free."""

    def _one(self, jpeg: bytes, spare: list[Any]) -> Decoded:
        buffer = spare.pop() if spare else None
        try:
            pixels = self._decode(jpeg, "RGB", buffer=buffer, strict=True)
        except ValueError:
            return Decoded(None)
        return Decoded(pixels, pixels)
