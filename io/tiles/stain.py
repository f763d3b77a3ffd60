"""Stains as vectors of optical density: their jitter, and Macenko's normalisation of a slide.

Optical density (OD) is -ln((v + 1) / 256) of a grey level v: 0 is white, and light that passes two
stains loses the sum of both. Whatever is done to stains is one affine map of OD, float64 [3, 4].
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

IDENTITY: Matrix = np.eye(3, 4)
STAIN_NORMS = ("macenko",)

# haematoxylin, eosin and DAB as rows, from Ruifrok & Johnston, "Quantification of histochemical
# staining by color deconvolution", Anal Quant Cytol Histol 23 (2001)
_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_HED /= np.linalg.norm(_HED, axis=1, keepdims=True)

# haematoxylin and eosin that slides are brought to: those that came with Veta's MATLAB code of
# Macenko's method, and that most tools use
REFERENCE_STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
# upper quartile of the amount of each in tissue: what 80 breast images of BRCA-M2C have when their
# 99th percentiles are brought to the 1.9705 and 1.0308 of that code
REFERENCE_AMOUNTS = np.array([0.585, 0.412])

_FAINT = 0.15  # mean OD below which a pixel counts as unstained (the paper's β)
_PERCENTILE = 1.0  # of the angles, cut at either end (the paper's α)
_LEAST_PIXELS, _MOST_PIXELS = 1_000, 500_000
_LEAST_ANGLE = 8.0  # degrees between two stains; the reference's are 22 apart
_MOST_SCALE = 4.0


@dataclass(frozen=True, slots=True)
class StainFit:
    """How a slide's optical densities become those of the reference.

    Attributes:
        matrix: float64 [3, 4]; the identity where the slide could not be fitted.
        note: Why it could not, or None.
    """

    matrix: Matrix
    note: str | None = None


def jitter(amount: NDArray[np.float64], shift: NDArray[np.float64]) -> NDArray[np.float64]:
    """Change the amount of each stain: c' = amount · c + shift for haematoxylin, eosin and DAB.

    The perturbation of Tellez et al., "Whole-slide mitosis detection in H&E breast histology using
    PHH3 as a reference", IEEE TMI 37 (2018).

    Args:
        amount: Factors [n, 3], about 1.
        shift: OD along the stain's unit vector [n, 3], about 0.

    Returns:
        Affine maps of OD [n, 3, 4].
    """
    linear = _HED.T @ (amount[:, :, None] * np.linalg.inv(_HED).T)
    return np.concatenate([linear, (shift @ _HED)[:, :, None]], axis=2)


def compose(second: NDArray[np.float64], first: NDArray[np.float64]) -> NDArray[np.float64]:
    """The affine map [..., 3, 4] that does `first`, then `second`."""
    both = second[..., :3] @ first
    both[..., 3] += second[..., 3]
    return both


def fit_macenko(thumbnail: NDArray[np.uint8], tissue: NDArray[np.bool_]) -> StainFit:
    """Find a slide's two stains and the map that makes them the reference's.

    Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI
    2009: the plane of the two largest singular vectors of the tissue's OD, and in it the extreme
    angles. What lies outside the plane is lost, as in the paper. Light is what comes through the
    slide's own glass, so that a scanner's cast goes too. Amounts are scaled by their upper quartile
    over the tissue and not, as in the paper, by their 99th percentile: from 0.5 to 12 µm/px, where
    thumbnails lie, a slide's percentile was seen to fall by half, its quartile by a third at most.

    Args:
        thumbnail: uint8 [h, w, 3].
        tissue: bool [h, w].
    """
    light = _glass_od(thumbnail, tissue)
    seen = thumbnail[tissue]
    od = optical_density(seen[:: max(1, len(seen) // _MOST_PIXELS)]) - light
    stained = od[od.mean(axis=1) > _FAINT]
    if len(stained) < _LEAST_PIXELS:
        return _unfit(f"only {len(stained):,} stained pixels on the thumbnail")
    _, axes = np.linalg.eigh(stained.T @ stained)
    plane = axes[:, :0:-1]  # the two largest
    plane *= np.where(plane.sum(axis=0) < 0, -1, 1)
    angles = np.arctan2(*(stained @ plane).T[::-1])
    low, high = np.percentile(angles, [_PERCENTILE, 100 - _PERCENTILE])
    if np.degrees(high - low) < _LEAST_ANGLE:
        return _unfit(f"its stains are {np.degrees(high - low):.1f}° apart: there is only one")
    stains = np.stack([plane @ (np.cos(a), np.sin(a)) for a in (low, high)])
    stains = stains[np.argsort(-stains[:, 0])]  # haematoxylin takes more of the red
    if (stains < -0.1).any():
        return _unfit("a stain would give light instead of taking it")
    ours, reference = _frame(stains), _frame(REFERENCE_STAINS)
    amounts = np.percentile(od @ np.linalg.inv(ours), 75, axis=0)[:2]
    scale = REFERENCE_AMOUNTS / np.maximum(amounts, 1e-6)
    if not ((scale < _MOST_SCALE) & (scale > 1 / _MOST_SCALE)).all():
        return _unfit("the amounts of its stains are too far from the reference's")
    linear = reference.T @ np.diag([*scale, 0.0]) @ np.linalg.inv(ours).T
    return StainFit(np.concatenate([linear, -(linear @ light)[:, None]], axis=1))


def optical_density(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """OD of grey levels, of any shape."""
    return np.asarray(_OD[pixels])


_OD = -np.log((np.arange(256) + 1) / 256)


def mapped(pixels: NDArray[np.uint8], matrix: Matrix) -> NDArray[np.uint8]:
    """Pixels [..., 3] after a map of their optical densities, for pictures.

    What encoders get is made by `pixels.change`, which does not round.
    """
    od = _OD.astype(np.float32)[pixels] @ matrix[:, :3].T.astype(np.float32)
    od += matrix[:, 3].astype(np.float32)
    np.exp(-od, out=od)
    return np.asarray((od * 256 - 0.5).clip(0, 255), np.uint8)  # - 1, rounded


def _unfit(why: str) -> StainFit:
    return StainFit(IDENTITY, f"stain not normalised: {why}")


def _frame(stains: NDArray[np.float64]) -> NDArray[np.float64]:
    """Two stains and what is perpendicular to both, as unit rows."""
    rows = np.stack([*stains, np.cross(*stains)])
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _glass_od(thumbnail: NDArray[np.uint8], tissue: NDArray[np.bool_]) -> NDArray[np.float64]:
    """OD [3] of the glass: the median of what is bright and no tissue, white where none is seen."""
    outside = thumbnail[~tissue]
    bright = outside[(outside.min(axis=1) > 150) & (outside.min(axis=1) < 254)]
    if len(bright) < 0.002 * tissue.size:
        return np.zeros(3)
    return optical_density(np.median(bright, axis=0).astype(np.uint8))
