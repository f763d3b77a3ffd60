"""Draw the random numbers that augment each tile; they do not depend on its batch."""

import hashlib
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from hmil_fast.errors import UsageError
from hmil_fast.io.tiles.stain import IDENTITY, compose, jitter

MAX_VIEWS = 64
_DRAWS = 16  # a tile's random numbers; their places never change, or stored views would
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_MID_GREY = 127.5


@dataclass(frozen=True, slots=True)
class PixelParams:
    """What is done to n tiles of encoder size, in the order of the fields; None leaves a step out.

    Grey levels are cut to 0–255 after `density` and after `colour`.

    Attributes:
        mirror: bool [n, 2], left to right and top to bottom.
        turns: int32 [n], quarter turns counter-clockwise, 0 to 3.
        sigma: float32 [n], of a Gaussian blur in px; 0 for none.
        radius: Px beyond which every tile's Gaussian is cut off, or 0 without blur.
        density: float32 [n, 3, 4], affine map of optical densities (see `stain`).
        colour: float32 [n, 3, 4], affine map of grey levels.
    """

    mirror: NDArray[np.bool_] | None = None
    turns: NDArray[np.int32] | None = None
    sigma: NDArray[np.float32] | None = None
    radius: int = 0
    density: NDArray[np.float32] | None = None
    colour: NDArray[np.float32] | None = None

    def part(self, rows: slice) -> "PixelParams":
        """Those of some of the tiles."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        cut = {k: v[rows] for k, v in own.items() if isinstance(v, np.ndarray)}
        return PixelParams(**(own | cut))


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How far tiles are changed; 0 or False leaves a step out.

    Attributes:
        mirror: Mirror in either axis, each in half of the tiles.
        turn: Turn by 0, 90, 180 or 270 degrees.
        brightness: Factor of all grey levels, 1 ± this.
        contrast: Factor of the distance to mid-grey, 1 ± this.
        saturation: Factor of the distance to the pixel's own grey, 1 ± this.
        hue: Turn of colours around the grey axis, ± this part of a circle.
        stain: Factor 1 ± this on haematoxylin, eosin and DAB each, and ± this much optical density
            (0.05 is the "light" of Tellez et al., Medical Image Analysis 58 (2019)).
        blur_px: Largest sigma of the Gaussian blur, in px of the encoder's input.
        blur_share: Share of the tiles that are blurred.
    """

    mirror: bool = True
    turn: bool = True
    brightness: float = 0.1
    contrast: float = 0.1
    saturation: float = 0.1
    hue: float = 0.02
    stain: float = 0.05
    blur_px: float = 1.0
    blur_share: float = 0.5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            most = {"blur_px": 8.0, "blur_share": 1.0, "hue": 0.5}.get(name, 1)
            if not 0 <= value <= most:
                raise UsageError(f"augmentation {name} is {value}", f"give 0 to {most:g}")

    def params(
        self,
        coords: NDArray[np.int64],
        *,
        slide_id: str,
        view: int,
        seed: int = 0,
        density: NDArray[np.float64] = IDENTITY,
    ) -> PixelParams:
        """Draw what is done to tiles.

        A tile's numbers come from its own counters of numpy's Philox generator, under a key of
        seed and slide: batches, order, workers and resume do not touch them.

        Args:
            coords: [n, 2], top-left corners in level-0 px, ≥ 0.
            slide_id: Any text.
            view: Number of the view, from 1.
            seed: Any number from 0.
            density: What is done to the slide's optical densities before they vary, [3, 4].
        """
        u = _draws(coords, slide_id, view, seed)
        about = 2 * u - 1  # from -1 to 1
        n = len(u)
        blurred = u[:, 3] < self.blur_share
        coloured = self.brightness or self.contrast or self.saturation or self.hue
        stained = bool(self.stain) or density is not IDENTITY
        varied = jitter(1 + self.stain * about[:, 5:8], self.stain * about[:, 8:11])
        return PixelParams(
            mirror=u[:, :2] < 0.5 if self.mirror else None,
            turns=(4 * u[:, 2]).astype(np.int32) if self.turn else None,
            sigma=np.where(blurred, self.blur_px * u[:, 4], 0).astype(np.float32)
            if self.blur_px
            else None,
            radius=int(np.ceil(3 * self.blur_px)),
            density=compose(varied, np.broadcast_to(density, (n, 3, 4))).astype(np.float32)
            if stained
            else None,
            colour=_colour(
                1 + self.brightness * about[:, 11],
                1 + self.contrast * about[:, 12],
                1 + self.saturation * about[:, 13],
                self.hue * about[:, 14],
            ).astype(np.float32)
            if coloured
            else None,
        )


def plain_params(n: int, density: NDArray[np.float64]) -> PixelParams | None:
    """What is done to tiles that do not vary: one map of optical densities [3, 4], or nothing."""
    if density is IDENTITY:
        return None
    return PixelParams(density=np.repeat(density[None].astype(np.float32), n, axis=0))


def _draws(coords: NDArray[np.int64], slide_id: str, view: int, seed: int) -> NDArray[np.float64]:
    """Uniform numbers from 0 to below 1, [n, _DRAWS]."""
    text = f"{seed}/".encode() + slide_id.encode("utf-8", "surrogatepass")
    key = np.frombuffer(hashlib.sha256(text).digest()[:16], "<u8").astype(np.uint64)
    raw = np.empty((len(coords), _DRAWS), np.uint64)
    for own, (x, y) in zip(raw, coords.tolist(), strict=True):
        counter = np.array([0, x, y, view], np.uint64)
        own[:] = np.random.Philox(key=key, counter=counter).random_raw(_DRAWS)
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53, np.float64)


def _colour(
    brightness: NDArray[np.float64],
    contrast: NDArray[np.float64],
    saturation: NDArray[np.float64],
    hue: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Affine maps of grey levels [n, 3, 4]: hue first, then saturation, contrast, brightness."""
    angle = 2 * np.pi * hue[:, None, None]
    grey = np.full((3, 3), 1 / 3)
    # Rodrigues' rotation about (1, 1, 1): its cross product, over the square root of 3
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    turned = grey + np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) * across
    s = saturation[:, None, None]
    mixed = s * np.eye(3) + (1 - s) * np.broadcast_to(_LUMA, (3, 3))
    linear = (brightness * contrast)[:, None, None] * (mixed @ turned)
    shift = brightness * (1 - contrast) * _MID_GREY
    return np.concatenate([linear, np.repeat(shift[:, None, None], 3, axis=1)], axis=2)
