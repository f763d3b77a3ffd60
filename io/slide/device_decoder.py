"""Decode whole JPEG and JPEG 2000 tiles straight into the memory of a GPU, by nvImageCodec.

nvImageCodec is the decoder inside cuCIM's newer plugin. It is called directly: cuCIM 26.10 decodes
on a GPU by regions, without a status for each tile, and a region of interest is what
nvImageCodec's issue 55 is about. Here the GPU only ever decodes whole tiles.
"""

import io
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from hmil_fast.io.slide.base import WHITE
from hmil_fast.io.slide.jpeg_check import full_jpeg
from hmil_fast.io.slide.protocol import UInt8
from hmil_fast.io.slide.sources import JPEG, JPEG2000_RGB, Unsuited, cpu_decoder, load_nvimgcodec
from hmil_fast.io.slide.tiff_facts import CODECS, TiffLevel
from hmil_fast.streams import Event, own_stream

SLOT_BYTES = 512 * 2**20  # of all source tiles of one size that are kept decoded
MIN_SLOTS = 16
MOST_APART = 1.0  # mean grey levels between a device's pixels and a CPU's
_THREADS = 4  # of a decoder on a GPU; each has a stream and pinned memory of its own
# the first that decodes as a CPU does, and no other: in a mixture pixels would hang on the load
JPEG_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("nvjpeg hardware", ("HW_GPU_ONLY",)),
    ("nvjpeg cuda", ("HYBRID_CPU_GPU", "GPU_ONLY")),
)
_JPEG2000_KIND = ("nvjpeg2k", ("GPU_ONLY", "HYBRID_CPU_GPU"))
# chroma is enlarged as libjpeg does it; Huffman's decoding of small images stays off the host
_OPTIONS = ":fancy_upsampling=1 nvjpeg_cuda_decoder:hybrid_huffman_threshold=0"


class Slots:
    """Places for decoded source tiles of one size; number 0 is white and is never given out.

    A place is given out again only once the device has done what read it: a hardware decoder
    writes when it is called, whatever a stream holds before (seen on H100, torchcodec issue 1634).
    So the host waits here, for work that is long done where there are places enough.

    Attributes:
        pixels: uint8 [places + 1, h, w, 3] on the device.
        images: Places as nvImageCodec's images, made when they are first used.
    """

    def __init__(self, count: int, tile: tuple[int, int], device: torch.device) -> None:
        wide, high = tile
        self.pixels = torch.empty(count + 1, high, wide, 3, dtype=torch.uint8, device=device)
        self.pixels[0] = WHITE
        self.images: dict[int, Any] = {}
        self._free = list(range(count, 0, -1))
        self._read: deque[tuple[Event, list[int]]] = deque()

    def __len__(self) -> int:
        return len(self.pixels) - 1

    @property
    def room(self) -> int:
        """Places that can be taken."""
        return len(self._free) + sum(len(places) for _, places in self._read)

    def take(self, count: int) -> list[int]:
        """Places to write to; `count` is at most `room`."""
        while len(self._free) < count:
            event, places = self._read.popleft()
            event.synchronize()
            self._free += places
        return [self._free.pop() for _ in range(count)]

    def give(self, places: list[int], read: Event) -> None:
        """Take places back, which may be written to once `read` is done."""
        if places:
            self._read.append((read, places))


class DeviceDecoder:
    """The decoder of one device in this process; all slides of a job share it, one after another.

    On a CPU it decodes the same way into host memory: for tests.

    Args:
        device: Where the pixels go.
        jpeg: What decodes JPEG there, a name in `JPEG_KINDS`, unseen; by default the first that
            does it as a CPU does.

    Attributes:
        device: As given.
        stream: In which tiles are decoded and cut.

    Raises:
        Unsuited: nvImageCodec is not installed, or does not decode there.
    """

    def __init__(self, device: torch.device, jpeg: str | None = None) -> None:
        self._codec = codec = load_nvimgcodec()
        self.device = device
        self.stream = own_stream(device)
        self._slots: dict[tuple[int, int], Slots] = {}
        plain = {"apply_exif_orientation": False}
        self._as_rgb = codec.DecodeParams(**plain, color_spec=codec.ColorSpec.SRGB)
        self._as_is = codec.DecodeParams(**plain, color_spec=codec.ColorSpec.SYCC)
        self._decoders: dict[int, tuple[str, Any]] = {}
        if device.type != "cuda":
            made = "nvImageCodec on the CPU", cpu_decoder(codec)
            self._decoders = {JPEG: made, JPEG2000_RGB: made}
            return
        try:
            named, kinds_2000 = _JPEG2000_KIND
            self._decoders[JPEG2000_RGB] = named, self._on_gpu(kinds_2000)
            for name, kinds in JPEG_KINDS:
                if jpeg not in (None, name):
                    continue
                decoder = self._on_gpu(kinds)
                if jpeg == name or self.right(decoder):
                    self._decoders[JPEG] = name, decoder
                    break
        except RuntimeError as error:
            raise Unsuited(" ".join(str(error).split())) from None
        if JPEG not in self._decoders:
            raise Unsuited("nvImageCodec finds no nvJPEG that decodes on this GPU")

    def name(self, compression: int) -> str:
        """What decodes tiles of a TIFF compression; `Unsuited` where nothing does."""
        if compression not in self._decoders:
            codec = CODECS.get(compression, compression)
            raise Unsuited(f"no GPU decodes {'uncompressed' if codec == 'none' else codec} tiles")
        return self._decoders[compression][0]

    def names(self) -> list[str]:
        """What decodes each codec."""
        return [name for name, _ in self._decoders.values()]

    def slots(self, tile: tuple[int, int]) -> Slots:
        """The places for tiles of (width, height); those of other sizes are kept while in use."""
        if tile not in self._slots:
            for other, slots in list(self._slots.items()):
                if slots.room == len(slots):
                    slots.take(len(slots))  # waits for who reads them
                    del self._slots[other]
            count = max(MIN_SLOTS, SLOT_BYTES // (tile[0] * tile[1] * 3))
            with self.stream.use():
                self._slots[tile] = Slots(count, tile, self.device)
            self.stream.record().synchronize()
        return self._slots[tile]

    def decode(
        self, facts: TiffLevel, data: Sequence[bytes], slots: Slots, places: Sequence[int]
    ) -> list[bool]:
        """Decode tiles into their places, in `stream`.

        Args:
            facts: Their level.
            data: Their bytes, seen to be whole; RGB in JPEG is not subsampled.
            slots: Of their size.
            places: One a tile, taken from `slots`.

        Returns:
            Whether each was decoded.
        """
        params = self._as_rgb
        if facts.compression == JPEG:
            # parsers call any three channels YCbCr; asked for as such, RGB comes back as it is
            params = self._as_rgb if facts.ycbcr else self._as_is
            data = [full_jpeg(raw, facts.tables, ycbcr=True) for raw in data]
        images = [self._image(slots, place) for place in places]
        _, decoder = self._decoders[facts.compression]
        streams = [self._codec.CodeStream(raw) for raw in data]
        made = decoder.decode(streams, images=images, params=params, cuda_stream=self.stream.handle)
        return [image is not None for image in made]

    def put(self, pixels: UInt8, slots: Slots, place: int) -> None:
        """Copy a tile that a CPU has decoded, uint8 [h, w, 3], to its place, in `stream`.

        At the border it may be smaller than its place; what lies outside the level is never read.
        """
        source = torch.from_numpy(np.ascontiguousarray(pixels))
        if self.device.type == "cuda":
            source = source.pin_memory()
        with self.stream.use():
            slots.pixels[place, : len(source), : source.shape[1]].copy_(source, non_blocking=True)

    def _image(self, slots: Slots, place: int) -> Any:
        if place not in slots.images:
            pixels: Any = slots.pixels[place]
            if self.device.type != "cuda":
                pixels = pixels.numpy()
            image = self._codec.as_image(pixels, cuda_stream=self.stream.handle)
            slots.images[place] = image
        return slots.images[place]

    def _on_gpu(self, kinds: Sequence[str]) -> Any:
        # named, or it would decode on the CPU without a word where a library is missing
        codec = self._codec
        return codec.Decoder(
            device_id=self.device.index or 0,
            max_num_cpu_threads=_THREADS,
            backends=[codec.Backend(getattr(codec.BackendKind, kind)) for kind in kinds],
            options=_OPTIONS,
        )

    def right(self, decoder: Any) -> bool:
        """Whether a decoder decodes a baseline JPEG of subsampled colour as libjpeg does."""
        coarse = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((256, 256)).save(buffer, "JPEG", quality=90, subsampling=2)
        stream = self._codec.CodeStream(buffer.getvalue())
        image = decoder.decode(stream, params=self._as_rgb)
        if image is None:
            return False
        theirs = np.asarray(Image.open(buffer), np.int16)
        return float(np.abs(np.asarray(image.cpu()) - theirs).mean()) < MOST_APART
