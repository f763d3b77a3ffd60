"""Resize and normalise: both backends against Pillow and each other."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hmil_fast.errors import UsageError
from hmil_fast.io.slide import open_slide
from hmil_fast.io.tiles.transform import TileTransform, build_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiles(slide_file: Callable[[str], Path]) -> np.ndarray:
    out = np.empty((12, 256, 256, 3), np.uint8)
    with open_slide(slide_file("mosaic.tif")) as slide:
        xy = np.array([(256 * x, 256 * (x + 3)) for x in range(2, 14)], np.int64)
        assert not slide.read(0, xy, 256, out).any()
    return out


def make(
    backend: str, input_px: int, how: str = "bilinear", device: torch.device = CPU
) -> TileTransform:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    return build_transform(
        read_px=256, input_px=input_px, mean=MEAN, std=STD, interpolation=how,
        batch=12, device=device, backend=backend,
    )  # fmt: skip


def levels(out: torch.Tensor) -> np.ndarray:
    """Back to grey levels, [n, h, w, 3]."""
    pixels = out.double().cpu() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (255 * pixels).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_normalise_is_exact(tiles: np.ndarray, backend: str) -> None:
    out = make(backend, 256)(tiles)
    assert out.shape == (12, 3, 256, 256)
    assert (out.dtype, out.device) == (torch.float32, CPU)
    exact = (tiles.transpose(0, 3, 1, 2) / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(
        STD, (3, 1, 1)
    )
    assert np.abs(out.numpy() - exact).max() < 1e-6


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("backend", "worst", "mean"), [("torch", 2, 0.1), ("dali", 20, 0.5)])
@pytest.mark.parametrize("input_px", [224, 128])
def test_resize_is_near_pillow(
    tiles: np.ndarray, backend: str, worst: float, mean: float, how: str, input_px: int
) -> None:
    ours = levels(make(backend, input_px, how)(tiles))
    kind = Image.Resampling.BILINEAR if how == "bilinear" else Image.Resampling.BICUBIC
    theirs = [np.asarray(Image.fromarray(t).resize((input_px, input_px), kind)) for t in tiles]
    apart = np.abs(ours - np.stack(theirs))
    assert apart.max() <= worst + 1e-3
    assert apart.mean() <= mean


@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize("input_px", [256, 224])
def test_short_batches_and_lasting_results(tiles: np.ndarray, backend: str, input_px: int) -> None:
    transform = make(backend, input_px)
    slab = tiles.copy()
    first = transform(slab)
    kept = first.clone()
    slab[:] = 0  # the slab is free as soon as the call returns
    for n in (5, 1, 12, 3):
        assert torch.equal(transform(tiles[:n]), kept[:n])
    assert torch.equal(first, kept)


@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize("input_px", [256, 224])
def test_tensors_are_transformed_like_arrays(
    tiles: np.ndarray, backend: str, input_px: int
) -> None:
    transform = make(backend, input_px)
    out = transform(torch.from_numpy(tiles))
    assert torch.equal(out, transform(tiles))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_half_on_request(tiles: np.ndarray) -> None:
    transform = make("torch", 224)
    half = transform(tiles, torch.float16)
    assert half.dtype == torch.float16
    assert torch.equal(half, transform(tiles).half())


def test_auto_takes_dali_only_where_nothing_is_resized() -> None:
    pytest.importorskip("nvidia.dali")
    assert make("auto", 256).backend == "dali"
    assert make("auto", 224).backend == "torch"


@pytest.mark.parametrize("bad", [{"interpolation": "lanczos"}, {"backend": "cv2"}])
def test_unknown_choices(bad: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        build_transform(
            **{
                "read_px": 256, "input_px": 224, "mean": MEAN, "std": STD,
                "interpolation": "bilinear", "batch": 1, "device": CPU, **bad,
            }
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize("input_px", [256, 224])
def test_gpu_equals_cpu(tiles: np.ndarray, backend: str, input_px: int) -> None:
    cpu = levels(make(backend, input_px)(tiles))
    slab = tiles.copy()
    out = make(backend, input_px, device=torch.device("cuda", 0))(slab)
    slab[:] = 0
    assert out.device.type == "cuda"
    assert np.abs(levels(out) - cpu).max() <= 1.01


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize("input_px", [256, 224])
def test_a_result_waits_for_whoever_reads_it_later(
    tiles: np.ndarray, backend: str, input_px: int
) -> None:
    """The next call must not write to memory that a queued copy has still to read."""
    device = torch.device("cuda", 0)
    transform = make(backend, input_px, device=device)
    batches = [np.roll(tiles, k, axis=1).copy() for k in range(8)]
    expected = [transform(batch).clone() for batch in batches]
    kept = [torch.empty_like(expected[0]) for _ in batches]
    torch.cuda.synchronize(device)
    for batch, place in zip(batches, kept, strict=True):
        torch.cuda._sleep(10**8)
        place.copy_(transform(batch))
    for place, want in zip(kept, expected, strict=True):
        assert torch.equal(place, want)
