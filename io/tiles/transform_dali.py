"""Transform tiles with a DALI graph, the same for CPU and GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from hmil_fast.io.tiles.augment import PixelParams

_NO_BLUR = 1e-3  # sigma that leaves a picture as it is: DALI has no word for none


@dataclass(frozen=True)
class Settings:
    """What all graphs of a transform share; `resize` is (side, interpolation) or None."""

    resize: tuple[int, str] | None
    mean: Sequence[float]
    std: Sequence[float]
    batch: int
    device: torch.device


class DaliTransform:
    """One graph for every combination of steps that tiles are asked with, made when first asked.

    Args:
        settings: Of all its graphs.
    """

    backend = "dali"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._graphs: dict[tuple[frozenset[str], int], Any] = {}
        self._fed: Any = None

    def __call__(
        self,
        pixels: NDArray[np.uint8] | Tensor,
        dtype: torch.dtype = torch.float32,
        params: PixelParams | None = None,
    ) -> Tensor:
        """As of `TileTransform`."""
        inputs = {} if params is None else _inputs(params)
        radius = params.radius if params is not None and "sigma" in inputs else 0
        kind = (frozenset(inputs), radius)
        if kind not in self._graphs:
            self._graphs[kind] = _graph(self._settings, *kind)
        graph = self._graphs[kind]
        device = self._settings.device
        on_gpu = device.type == "cuda"
        # DALI takes no copy of them: they stay until the next call, in torch's stream
        self._fed = (
            torch.as_tensor(pixels).to(device, non_blocking=True) if on_gpu else np.asarray(pixels)
        )
        graph.feed_input("pixels", self._fed)
        for name, values in inputs.items():
            graph.feed_input(name, values)
        # bound to torch's stream: what is queued there reads the output before the next run does
        # write to that memory, and the host waits for neither
        (out,) = graph.run(torch.cuda.current_stream(device)) if on_gpu else graph.run()
        # pixels with their channels side by side are torch's channels_last, without a copy
        return from_dlpack(out.as_tensor()).permute(0, 3, 1, 2).to(dtype)


def dali_installed() -> bool:
    """Whether DALI can be imported."""
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def _inputs(params: PixelParams) -> dict[str, NDArray[Any]]:
    """The parameters that are there, as the graph's inputs, one sample a tile."""
    found: dict[str, NDArray[Any]] = {}
    if params.mirror is not None:
        across, down = params.mirror.astype(np.int32).T
        found |= {"across": np.ascontiguousarray(across), "down": np.ascontiguousarray(down)}
    if params.turns is not None:
        found["angle"] = (90 * params.turns).astype(np.float32)
    if params.sigma is not None:
        found["sigma"] = np.maximum(params.sigma, np.float32(_NO_BLUR))
    if params.density is not None:
        found["density"] = np.ascontiguousarray(params.density)
    if params.colour is not None:
        found["colour"] = np.ascontiguousarray(params.colour)
    return found


def _graph(settings: Settings, inputs: frozenset[str], radius: int) -> Any:
    dali: Any = import_module("nvidia.dali")  # its type stubs lack half of what it exports
    fn, types = import_module("nvidia.dali.fn"), dali.types
    on_gpu = settings.device.type == "cuda"

    def given(name: str, kind: Any) -> Any:
        return fn.external_source(name=name, dtype=kind)

    def graph() -> Any:
        place = "gpu" if on_gpu else "cpu"
        x: Any = fn.external_source(
            name="pixels", device=place, layout="HWC", dtype=types.UINT8, no_copy=True
        )
        if settings.resize is not None:
            side, how = settings.resize
            kind = types.INTERP_LINEAR if how == "bilinear" else types.INTERP_CUBIC
            x = fn.resize(x, size=[side, side], interp_type=kind, antialias=True)
        if "across" in inputs:
            flips = {name: given(name, types.INT32) for name in ("across", "down")}
            x = fn.flip(x, horizontal=flips["across"], vertical=flips["down"])
        if "angle" in inputs:
            nearest = types.INTERP_NN
            angle = given("angle", types.FLOAT)
            x = fn.rotate(x, angle=angle, keep_size=True, interp_type=nearest)
        if "sigma" in inputs:
            sigma = given("sigma", types.FLOAT)
            x = fn.gaussian_blur(x, sigma=sigma, window_size=2 * radius + 1, dtype=types.FLOAT)
        if "density" in inputs:
            od = -dali.math.log((x + 1) / 256)
            od = fn.coord_transform(od, MT=given("density", types.FLOAT))
            x = dali.math.clamp(256 * dali.math.exp(-od) - 1, 0, 255)
        if "colour" in inputs:
            x = fn.coord_transform(x, MT=given("colour", types.FLOAT), dtype=types.FLOAT)
            x = dali.math.clamp(x, 0, 255)
        return fn.crop_mirror_normalize(
            fn.reshape(x, layout="HWC"),
            dtype=types.FLOAT,
            output_layout="HWC",
            mean=[255 * m for m in settings.mean],
            std=[255 * s for s in settings.std],
        )

    built = dali.pipeline_def(
        batch_size=settings.batch,
        num_threads=torch.get_num_threads(),
        device_id=(settings.device.index or 0) if on_gpu else None,
        prefetch_queue_depth=1,
    )(graph)()
    built.build()
    return built
