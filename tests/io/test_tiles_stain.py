"""Macenko's normalisation on real tissue, and what it says where there is nothing to fit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hmil_fast.io.slide import open_slide
from hmil_fast.io.tiles.augment import plain_params
from hmil_fast.io.tiles.pixels import change
from hmil_fast.io.tiles.stain import (
    IDENTITY,
    REFERENCE_STAINS,
    fit_macenko,
    optical_density,
)
from hmil_fast.io.tiles.tissue import find_tissue

# gain and gamma per channel
CASTS = {
    "bluish": ((0.90, 0.94, 1.0), (1.1, 1.0, 0.9)),
    "pinkish": ((1.0, 0.93, 0.95), (0.85, 1.05, 1.1)),
}


def cast(pixels: np.ndarray, scanner: str) -> np.ndarray:
    """The same slide from a scanner of other light and other sensors."""
    gain, gamma = CASTS[scanner]
    return np.rint(255 * np.array(gain) * (pixels / 255) ** np.array(gamma)).astype(np.uint8)


def normalised(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    tiles = torch.from_numpy(pixels[None].copy()).permute(0, 3, 1, 2)
    return change(tiles, plain_params(1, matrix))[0].permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def small(slide_file: Callable[[str], Path]) -> tuple[np.ndarray, float]:
    """A whole small slide and its µm per px."""
    with open_slide(slide_file("CMU-1-Small-Region.svs")) as slide:
        thumbnail = slide.thumbnail(1500)
        return thumbnail, slide.info.level_mpp(0) * 2220 / thumbnail.shape[1]


@pytest.mark.slow
def test_two_scanners_come_nearer(small: tuple[np.ndarray, float]) -> None:
    pixels, um_per_px = small
    tissue = find_tissue(pixels, um_per_px).mask
    before, after = [], []
    for scanner in CASTS:
        seen = cast(pixels, scanner)
        fit = fit_macenko(seen, find_tissue(seen, um_per_px).mask)
        assert fit.note is None
        before.append(seen[tissue].astype(np.float64))
        after.append(normalised(seen, fit.matrix)[tissue])
    apart = np.abs(before[0] - before[1]).mean()
    assert apart > 15  # grey levels
    assert np.abs(after[0] - after[1]).mean() < apart / 4


def test_the_result_has_the_stains_of_the_reference(small: tuple[np.ndarray, float]) -> None:
    pixels, um_per_px = small
    tissue = find_tissue(pixels, um_per_px).mask
    fit = fit_macenko(pixels, tissue)
    od = optical_density(pixels[tissue]) @ fit.matrix[:, :3].T + fit.matrix[:, 3]
    normal = np.cross(*REFERENCE_STAINS)
    assert np.abs(od @ normal).max() < 1e-9  # all in the plane of the two
    again = fit_macenko(np.rint(normalised(pixels, fit.matrix)).astype(np.uint8), tissue)
    twice = again.matrix[:, :3] @ REFERENCE_STAINS.T
    assert np.abs(twice - REFERENCE_STAINS.T).max() < 0.1
    white = np.full((1, 1, 3), 243, np.uint8)  # this slide's glass
    assert normalised(white, fit.matrix).min() > 250


def test_amounts_hardly_depend_on_the_thumbnails_scale(small: tuple[np.ndarray, float]) -> None:
    pixels, um_per_px = small
    rows, columns = (side // 8 * 8 for side in pixels.shape[:2])
    coarse = pixels[:rows, :columns].reshape(rows // 8, 8, columns // 8, 8, 3).mean((1, 3))
    coarse = coarse.astype(np.uint8)
    fits = [
        fit_macenko(p, find_tissue(p, um).mask)
        for p, um in ((pixels, um_per_px), (coarse, 8 * um_per_px))
    ]
    od = np.array([[0.4, 0.8, 0.4]])
    fine, far = (f.matrix[:, :3] @ od[0] for f in fits)
    assert np.linalg.norm(fine - far) < 0.2 * np.linalg.norm(fine)


def test_ill_posed_slides_are_left_alone(small: tuple[np.ndarray, float]) -> None:
    pixels, um_per_px = small
    tissue = find_tissue(pixels, um_per_px).mask
    haematoxylin = 256 * np.exp(-optical_density(pixels)[..., :1] * REFERENCE_STAINS[0]) - 1
    grey = np.repeat(pixels.mean(2, keepdims=True), 3, axis=2)
    for picture, mask, why in (
        (haematoxylin, tissue, "only one"),
        (grey, tissue, "only one"),
        (pixels, np.zeros_like(tissue), "only 0 stained"),
        (np.full_like(pixels, 240), tissue, "only 0 stained"),
    ):
        fit = fit_macenko(np.rint(picture).astype(np.uint8), mask)
        assert fit.matrix is IDENTITY
        assert fit.note is not None
        assert why in fit.note


def test_fluorescence_is_left_alone(slide_file: Callable[[str], Path]) -> None:
    with open_slide(slide_file("dapi_small.ndpi")) as slide:
        thumbnail = slide.thumbnail(1024)
    fit = fit_macenko(thumbnail, find_tissue(thumbnail, 1.0).mask)
    assert fit.note is not None
    assert fit.note.startswith("stain not normalised")
