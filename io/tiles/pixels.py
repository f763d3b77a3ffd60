"""Augment and stain-normalise a batch of tiles in torch."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d, pad

from hmil_fast.io.tiles.augment import PixelParams


def change(tiles: Tensor, params: PixelParams) -> Tensor:
    """Do to each tile what its parameters say.

    Args:
        tiles: uint8 [n, 3, s, s], in any memory format.
        params: Of these n tiles.

    Returns:
        Grey levels, float32 [n, 3, s, s], not rounded.
    """
    x = _turned(tiles.contiguous(), params).float()
    if params.sigma is not None:
        _blur(x, params.sigma, params.radius)
    if params.density is not None:
        # densities without their minus sign: ln((v + 1) / 256)
        x = x.add_(1).mul_(1 / 256).log_()
        signed = params.density * np.array([1, 1, 1, -1], np.float32)
        x = _affine(x, signed).exp_().mul_(256).sub_(1).clamp_(0, 255)
    if params.colour is not None:
        x = _affine(x, params.colour).clamp_(0, 255)
    return x


def _turned(tiles: Tensor, params: PixelParams) -> Tensor:
    n = len(tiles)
    way = np.zeros(n, np.int64)
    if params.mirror is not None:
        way += params.mirror @ np.array([1, 2])
    if params.turns is not None:
        way += 4 * params.turns
    if not way.any():
        return tiles
    out = torch.empty_like(tiles)
    for which in np.unique(way).tolist():
        rows = _to(np.flatnonzero(way == which), tiles)
        axes = [axis for bit, axis in ((1, 3), (2, 2)) if which & bit]
        out[rows] = torch.rot90(tiles[rows].flip(axes), which // 4, (2, 3))
    return out


def _blur(x: Tensor, sigma: NDArray[np.float32], radius: int) -> None:
    """In place: a Gaussian of each tile's own, in both directions; edges are mirrored."""
    blurred = np.flatnonzero(sigma)
    if not len(blurred):
        return
    at = np.arange(-radius, radius + 1) / sigma[blurred].astype(np.float64)[:, None]
    weights = np.exp(-(at**2) / 2)
    weights /= weights.sum(axis=1, keepdims=True)
    kernel = _to(np.repeat(weights, 3, axis=0).astype(np.float32), x)
    rows, side, maps = _to(blurred, x), x.shape[-1], 3 * len(blurred)
    part = pad(x[rows], [radius] * 4, mode="reflect").view(1, maps, *[side + 2 * radius] * 2)
    part = conv2d(part, kernel.view(maps, 1, 1, -1), groups=maps)
    part = conv2d(part, kernel.view(maps, 1, -1, 1), groups=maps)
    x[rows] = part.view(-1, 3, side, side)


def _affine(x: Tensor, maps: NDArray[np.float32]) -> Tensor:
    """Per-tile maps [n, 3, 4] on the channels of x [n, 3, s, s], contiguous."""
    matrix = _to(maps, x)
    return torch.baddbmm(matrix[:, :, 3:], matrix[:, :, :3], x.flatten(2)).view_as(x)


def _to(values: NDArray[np.generic], like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, non_blocking=True)
