"""Tiles to encoder input: resize with antialias where sizes differ, scale, normalise."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.dlpack import from_dlpack

from hmil_fast.errors import UsageError

INTERPOLATIONS = ("bilinear", "bicubic")


class TileTransform(Protocol):
    """Pixels in, encoder input out."""

    backend: str

    def __call__(self, pixels: NDArray[np.uint8], dtype: torch.dtype = torch.float32) -> Tensor:
        """Transform up to `batch` tiles.

        Args:
            pixels: uint8 [n, read_px, read_px, 3], C-contiguous; free again on return.
            dtype: float32, or half where the encoder runs in it.

        Returns:
            [n, 3, input_px, input_px] on the transform's device, in any memory format.
        """
        ...


def build_transform(
    *,
    read_px: int,
    input_px: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    batch: int,
    device: torch.device,
    backend: str = "auto",
) -> TileTransform:
    """Make the transform of one slide's tiles.

    "auto" takes DALI where nothing is resized and torch where something is: on one CPU core DALI
    normalises a 256-px tile in 0.12 ms against 0.27, but torch resizes and normalises 256 → 224 in
    0.27 ms against 0.63 and lies nearer to Pillow, which most encoders were trained with. The rule
    is the same on a GPU, so that a tile's features do not hang on the device.

    Both round to uint8 after the resize. They differ by float rounding where nothing is resized,
    else by a quarter of a grey level on average (single pixels by more: their filters differ).

    Args:
        read_px: Side of the tiles that come in.
        input_px: Side that the encoder wants.
        mean: Mean per RGB channel, in units of 0–1.
        std: Standard deviation per RGB channel, in units of 0–1.
        interpolation: "bilinear" or "bicubic", antialiased.
        batch: Most tiles a call.
        device: Where the result lies and the work is done.
        backend: "dali", "torch", or "auto".

    Raises:
        UsageError: An unknown interpolation or backend, or DALI asked for but not installed.
    """
    if interpolation not in INTERPOLATIONS:
        raise UsageError(f"interpolation {interpolation!r}", f"use one of {INTERPOLATIONS}")
    if backend == "auto":
        backend = "dali" if _dali_installed() and read_px == input_px else "torch"
    if backend == "torch":
        return _TorchTransform(input_px, mean, std, interpolation, device)
    if backend != "dali":
        raise UsageError(f"backend {backend!r}", "use auto, dali or torch")
    if not _dali_installed():
        raise UsageError("DALI is not installed", 'run pip install "hmil-fast[cu13]" or use torch')
    resize = None if read_px == input_px else (input_px, interpolation)
    return _DaliTransform(resize, mean, std, batch, device)


class _TorchTransform:
    backend = "torch"

    def __init__(
        self,
        input_px: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
        device: torch.device,
    ) -> None:
        self._input_px = input_px
        self._interpolation = interpolation
        self._device = device
        scale = 255 * torch.tensor(std, dtype=torch.float64).view(3, 1, 1)
        shift = torch.tensor(mean, dtype=torch.float64).view(3, 1, 1) * 255 / scale
        self._scale, self._shift = (1 / scale).float().to(device), shift.float().to(device)

    def __call__(self, pixels: NDArray[np.uint8], dtype: torch.dtype = torch.float32) -> Tensor:
        tiles = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)
        if tiles.shape[-1] != self._input_px:
            size = [self._input_px, self._input_px]
            exact = tiles if self._device.type == "cpu" else tiles.float()
            tiles = interpolate(exact, size, mode=self._interpolation, antialias=True)
            if tiles.dtype != torch.uint8:
                tiles = tiles.round_().clamp_(0, 255)
        out = tiles.to(torch.float32, memory_format=torch.channels_last)  # as encoders compute
        return out.mul_(self._scale).sub_(self._shift).to(dtype)


class _DaliTransform:
    backend = "dali"

    def __init__(
        self,
        resize: tuple[int, str] | None,
        mean: Sequence[float],
        std: Sequence[float],
        batch: int,
        device: torch.device,
    ) -> None:
        self._on_gpu = device.type == "cuda"
        device_id = (device.index or 0) if self._on_gpu else None
        self._pipeline = _pipeline(resize, mean, std, batch, device_id)

    def __call__(self, pixels: NDArray[np.uint8], dtype: torch.dtype = torch.float32) -> Tensor:
        self._pipeline.feed_input("pixels", pixels)
        (out,) = self._pipeline.run()
        return from_dlpack(out.as_tensor()).to(dtype)


def _pipeline(
    resize: tuple[int, str] | None,
    mean: Sequence[float],
    std: Sequence[float],
    batch: int,
    device_id: int | None,
) -> Any:
    """One graph for both devices: device_id None is the CPU."""
    dali: Any = import_module("nvidia.dali")  # its type stubs lack half of what it exports
    fn, types = import_module("nvidia.dali.fn"), dali.types

    def graph() -> Any:
        # a GPU may still read the pixels after the call returns: there DALI keeps a copy
        here = device_id is None
        tiles: Any = fn.external_source(
            name="pixels", layout="HWC", dtype=types.UINT8, no_copy=here
        )
        if not here:
            tiles = tiles.gpu()
        if resize is not None:
            size, how = resize
            kind = types.INTERP_LINEAR if how == "bilinear" else types.INTERP_CUBIC
            tiles = fn.resize(tiles, size=[size, size], interp_type=kind, antialias=True)
        return fn.crop_mirror_normalize(
            tiles,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * m for m in mean],
            std=[255 * s for s in std],
        )

    built = dali.pipeline_def(
        batch_size=batch,
        num_threads=torch.get_num_threads(),
        device_id=device_id,
        prefetch_queue_depth=1,
    )(graph)()
    built.build()
    return built


def _dali_installed() -> bool:
    from importlib.util import find_spec

    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False
