"""Augmentation: a tile's own numbers, the steps' meaning, and two backends that agree."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from hmil_fast.errors import UsageError
from hmil_fast.io.slide import open_slide
from hmil_fast.io.tiles.augment import Augmentation, PixelParams, plain_params
from hmil_fast.io.tiles.pixels import change
from hmil_fast.io.tiles.stain import IDENTITY, compose, jitter
from hmil_fast.io.tiles.transform import TileTransform, build_transform

CPU = torch.device("cpu")
COORDS = np.array([(256 * x, 256 * y) for y in (4, 5) for x in range(2, 8)], np.int64)
STRONG = Augmentation(brightness=0.3, contrast=0.3, saturation=0.5, hue=0.2, stain=0.2, blur_px=1.5)
STEPS = {
    "turns": ("mirror", "turns"),
    "blur": ("sigma", "radius"),
    "density": ("density",),
    "colour": ("colour",),
    "all": tuple(asdict(PixelParams())),
}


@pytest.fixture(scope="module")
def tiles(slide_file: Callable[[str], Path]) -> np.ndarray:
    out = np.empty((12, 256, 256, 3), np.uint8)
    with open_slide(slide_file("cmu1_small_pyramid.tif")) as slide:
        assert not slide.read(0, COORDS, 256, out).any()
    return out


def make(backend: str, input_px: int = 256, device: torch.device = CPU) -> TileTransform:
    """A transform whose results are grey levels."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    return build_transform(
        read_px=256, input_px=input_px, mean=(0, 0, 0), std=(1 / 255,) * 3,
        interpolation="bilinear", batch=12, device=device, backend=backend,
    )  # fmt: skip


def drawn(coords: np.ndarray = COORDS, **other: object) -> PixelParams:
    how = {"slide_id": "a/ü", "view": 1, "seed": 7} | other
    return STRONG.params(coords, **how)  # type: ignore[arg-type]


def only(params: PixelParams, step: str) -> PixelParams:
    return PixelParams(**{name: getattr(params, name) for name in STEPS[step]})


def same(a: PixelParams, b: PixelParams) -> list[bool]:
    return [np.array_equal(getattr(a, name), getattr(b, name)) for name in STEPS["all"]]


def test_a_tile_has_its_own_numbers() -> None:
    whole = drawn()
    for rows in (slice(0, 1), slice(3, 10), slice(11, 12)):
        assert all(same(drawn(COORDS[rows]), whole.part(rows)))
    assert all(same(drawn(COORDS[::-1]), whole.part(slice(None, None, -1))))
    moved = COORDS + np.array([1, 0])
    for other in ({"view": 2}, {"seed": 8}, {"slide_id": "a/u"}, {"coords": moved}):
        for name in ("mirror", "turns", "sigma", "density", "colour"):
            assert not np.array_equal(getattr(drawn(**other), name), getattr(whole, name))
    assert len(np.unique(whole.colour[:, 0, 3])) == len(COORDS)


def test_numbers_stay_those_of_this_release() -> None:
    """Stored views must be the same whoever extracts the rest of a cohort."""
    found = drawn(np.array([(0, 0), (512, 1024), (2**31 - 1, 0), (3, 5)], np.int64))
    assert found.turns.tolist() == [3, 2, 2, 3]
    assert found.sigma.tolist() == pytest.approx([0.0, 0.0, 0.106142, 1.350338], rel=1e-5)
    assert found.colour[:, 0, 3].tolist() == pytest.approx(
        [36.80098, -29.899872, -17.779383, 9.566542], rel=1e-5
    )


def test_numbers_fill_their_ranges() -> None:
    at = np.stack(np.meshgrid(np.arange(50), np.arange(40)), -1).reshape(-1, 2) * 256
    p = drawn(at)
    assert np.bincount(p.turns).min() > 400
    assert 0.45 < p.mirror.mean() < 0.55
    assert 0.45 < (p.sigma > 0).mean() < 0.55
    assert 1.4 < p.sigma.max() <= 1.5
    shift = p.colour[:, 0, 3]  # brightness · (1 - contrast) · 127.5
    assert shift.min() < -35
    assert shift.max() > 35


@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize("input_px", [256, 224])
def test_pixels_do_not_depend_on_the_batch(tiles: np.ndarray, backend: str, input_px: int) -> None:
    transform, params = make(backend, input_px), drawn()
    whole = transform(tiles, params=params)
    for rows in (slice(0, 5), slice(5, 6), slice(2, 12)):
        part = np.ascontiguousarray(tiles[rows])
        assert torch.equal(transform(part, params=params.part(rows)), whole[rows])
    back = slice(None, None, -1)
    turned = transform(np.ascontiguousarray(tiles[back]), params=params.part(back))
    assert torch.equal(turned.flip(0), whole)


@pytest.mark.parametrize("step", STEPS)
def test_both_backends_agree(tiles: np.ndarray, step: str) -> None:
    params = only(drawn(), step)
    ours, theirs = (make(name)(tiles, params=params) for name in ("torch", "dali"))
    assert (ours - theirs).abs().max() < 1e-3  # of a grey level
    assert not torch.equal(ours, make("torch")(tiles))


def test_both_backends_agree_after_a_resize(tiles: np.ndarray) -> None:
    ours, theirs = (make(name, 224)(tiles, params=drawn()) for name in ("torch", "dali"))
    assert (ours - theirs).abs().mean() < 0.5  # what their filters differ by


def test_auto_takes_torch_for_tiles_that_are_changed(tiles: np.ndarray) -> None:
    pytest.importorskip("nvidia.dali")
    auto, params = make("auto"), drawn()
    assert torch.equal(auto(tiles, params=params), make("torch")(tiles, params=params))
    assert torch.equal(auto(tiles), make("dali")(tiles))


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_turns_are_those_of_numpy(tiles: np.ndarray, backend: str) -> None:
    mirror = np.array([(a, b) for a in (0, 1) for b in (0, 1) for _ in range(3)], bool)
    turns = np.arange(12, dtype=np.int32) % 4
    out = make(backend)(tiles, params=PixelParams(mirror=mirror, turns=turns))
    for tile, (across, down), turn, got in zip(tiles, mirror, turns, out, strict=True):
        mirrored = tile[:: -1 if down else 1, :: -1 if across else 1]
        assert np.array_equal(got.permute(1, 2, 0).numpy(), np.rot90(mirrored, turn))


def test_blur_is_a_gaussian(tiles: np.ndarray) -> None:
    params = only(drawn(), "blur")
    out = make("torch")(tiles, params=params).numpy()
    assert (params.sigma == 0).any()
    for tile, sigma, got in zip(tiles, params.sigma.tolist(), out, strict=True):
        exact = tile.astype(np.float64)
        for axis in (0, 1) if sigma else ():
            exact = ndimage.gaussian_filter1d(
                exact, sigma, axis, mode="mirror", radius=params.radius
            )
        assert np.abs(got.transpose(1, 2, 0) - exact).max() < 1e-3


def test_stain_jitter_changes_the_amounts_of_stains() -> None:
    skimage = pytest.importorskip("skimage.color")
    rng = np.random.default_rng(0)
    amount, shift = rng.uniform(0.8, 1.2, (5, 3)), rng.uniform(-0.1, 0.1, (5, 3))
    od = rng.uniform(0, 2, (5, 3))
    maps = jitter(amount, shift)
    found = np.einsum("nij,nj->ni", maps[:, :, :3], od) + maps[:, :, 3]
    vectors = skimage.rgb_from_hed / np.linalg.norm(skimage.rgb_from_hed, axis=1, keepdims=True)
    assert np.allclose(
        found @ np.linalg.inv(vectors), amount * (od @ np.linalg.inv(vectors)) + shift
    )
    twice = compose(maps, maps)
    again = np.einsum("nij,nj->ni", maps[:, :, :3], found) + maps[:, :, 3]
    assert np.allclose(np.einsum("nij,nj->ni", twice[:, :, :3], od) + twice[:, :, 3], again)


def test_a_map_of_densities_does_what_it_says(tiles: np.ndarray) -> None:
    density = only(drawn(), "density").density
    out = change(torch.from_numpy(tiles).permute(0, 3, 1, 2), PixelParams(density=density))
    od = -np.log((tiles.astype(np.float64) + 1) / 256)
    od = np.einsum("nij,nhwj->nhwi", density[:, :, :3], od) + density[:, None, None, :, 3]
    exact = np.clip(256 * np.exp(-od) - 1, 0, 255).transpose(0, 3, 1, 2)
    assert np.abs(out.numpy() - exact).max() < 1e-3


def test_colour_keeps_grey_grey_and_hue_turns() -> None:
    grey = torch.full((1, 3, 4, 4), 90, dtype=torch.uint8)
    red = torch.tensor([200, 20, 20], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    tinted = Augmentation(brightness=0, contrast=0, saturation=1, hue=0.5)
    for x in range(20):
        params = tinted.params(np.array([[x, 0]]), slide_id="s", view=1)
        kept = change(grey, PixelParams(colour=params.colour))
        assert torch.allclose(kept, torch.full_like(kept, 90), atol=1e-3)
    # a third of a circle takes red to green
    third = PixelParams(colour=_hue(1 / 3))
    assert change(red, third)[0, :, 0, 0].tolist() == pytest.approx([20, 200, 20], abs=1e-3)


def _hue(part: float) -> np.ndarray:
    from hmil_fast.io.tiles.augment import _colour

    one = np.ones(1)
    return _colour(one, one, one, np.array([part])).astype(np.float32)


def test_what_is_off_is_left_out() -> None:
    off = Augmentation(False, False, 0, 0, 0, 0, 0, 0)
    assert off.params(COORDS, slide_id="s", view=1) == PixelParams()
    assert plain_params(3, IDENTITY) is None
    density = np.eye(3, 4) * 2
    kept = off.params(COORDS, slide_id="s", view=1, density=density)
    assert np.allclose(kept.density, plain_params(12, density).density)


@pytest.mark.parametrize("bad", [{"stain": 1.5}, {"blur_px": -1}, {"hue": float("nan")}])
def test_strengths_that_make_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        replace(Augmentation(), **bad)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_gpu_equals_cpu(tiles: np.ndarray, backend: str) -> None:
    cpu = make(backend)(tiles, params=drawn())
    gpu = make(backend, device=torch.device("cuda", 0))(tiles, params=drawn())
    assert (gpu.cpu() - cpu).abs().max() < 0.05
