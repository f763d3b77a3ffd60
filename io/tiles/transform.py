"""Transform tiles to encoder input: resize with antialias, augment, scale, normalise."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from hmil_fast.errors import UsageError
from hmil_fast.io.tiles.augment import PixelParams
from hmil_fast.io.tiles.pixels import change
from hmil_fast.io.tiles.transform_dali import DaliTransform, Settings, dali_installed

INTERPOLATIONS = ("bilinear", "bicubic")
_CPU_TILES = 8  # changed at a time: their floats stay in a core's cache


class TileTransform(Protocol):
    """Pixels in, encoder input out."""

    backend: str

    def __call__(
        self,
        pixels: NDArray[np.uint8] | Tensor,
        dtype: torch.dtype = torch.float32,
        params: PixelParams | None = None,
    ) -> Tensor:
        """Transform up to `batch` tiles.

        Args:
            pixels: uint8 [n, read_px, read_px, 3], C-contiguous, on the host or on the transform's
                device. On a CPU they are free again on return; on a GPU once what the current
                stream holds by then is done.
            dtype: float32, or half where the encoder runs in it.
            params: What is done to each of them between resize and normalisation.

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

    Tiles that are changed (`params`) go to torch: flips, turns, blur, stain and colour take 1.5
    CPU-ms a 256-px tile there against 5.2 in DALI. Both do the same, to a thousandth of a grey
    level.

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
        raise UsageError(f"interpolation is {interpolation!r}", f"use one of {INTERPOLATIONS}")
    if backend == "auto":
        backend = "auto" if dali_installed() and read_px == input_px else "torch"
    if backend not in ("auto", "dali", "torch"):
        raise UsageError(f"backend is {backend!r}", "use auto, dali or torch")
    by_torch = _TorchTransform(input_px, mean, std, interpolation, device)
    if backend == "torch":
        return by_torch
    if not dali_installed():
        raise UsageError("DALI is not installed", 'run pip install "hmil-fast[cu13]" or use torch')
    resize = None if read_px == input_px else (input_px, interpolation)
    by_dali = DaliTransform(Settings(resize, mean, std, batch, device))
    return by_dali if backend == "dali" else _Quicker(by_dali, by_torch)


class _Quicker:
    """DALI for tiles as they are, torch for those that are changed."""

    backend = "dali"

    def __init__(self, plain: TileTransform, changed: TileTransform) -> None:
        self._plain, self._changed = plain, changed

    def __call__(
        self,
        pixels: NDArray[np.uint8] | Tensor,
        dtype: torch.dtype = torch.float32,
        params: PixelParams | None = None,
    ) -> Tensor:
        return (self._plain if params is None else self._changed)(pixels, dtype, params)


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

    def __call__(
        self,
        pixels: NDArray[np.uint8] | Tensor,
        dtype: torch.dtype = torch.float32,
        params: PixelParams | None = None,
    ) -> Tensor:
        on_device = torch.as_tensor(pixels).to(self._device, non_blocking=True)
        tiles = on_device.permute(0, 3, 1, 2)
        if tiles.shape[-1] != self._input_px:
            size = [self._input_px, self._input_px]
            exact = tiles if self._device.type == "cpu" else tiles.float()
            tiles = interpolate(exact, size, mode=self._interpolation, antialias=True)
            if tiles.dtype != torch.uint8:
                tiles = tiles.round_().clamp_(0, 255)
        if params is None:
            out = tiles.to(torch.float32, memory_format=torch.channels_last)  # as encoders compute
        else:
            out = torch.empty_like(tiles, dtype=torch.float32, memory_format=torch.channels_last)
            step = _CPU_TILES if self._device.type == "cpu" else max(len(tiles), 1)
            for at in range(0, len(tiles), step):
                rows = slice(at, at + step)
                out[rows] = change(tiles[rows].to(torch.uint8), params.part(rows))
        return out.mul_(self._scale).sub_(self._shift).to(dtype)
