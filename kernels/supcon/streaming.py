"""The sums of SupCon tile by tile: no [R, R] matrix, neither forward nor backward.

The products are symmetric, so only tiles on and right of the diagonal are worked out; each serves
its rows and its columns. Tiles come in a fixed order: the same input gives the same bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_TILE = 1024  # rows and columns; 4 MiB of float32, large enough to keep every thread busy
_SAFE = 40.0  # e^±40, and a sum of any number of them, is far from the ends of float32


def lse_streaming(z: Tensor, temperature: float) -> Tensor:
    """Log Σ_{j ≠ i} exp(z_i·z_j/τ) for every row i.

    For unit rows and τ > 0.025 no exponent leaves ±40, so that sums of exponentials add up as they
    are; otherwise every tile has its own maximum taken out.

    Args:
        z: [R, D], float32 or float64.
        temperature: τ.

    Returns:
        [R]; 0 if R is 1.
    """
    if len(z) < 2:
        return z.new_zeros(len(z))
    if _safe(z, temperature):
        sums = z.new_zeros(len(z))
        for rows, columns, tile in _tiles(z, temperature):
            tile.exp_()
            sums[rows] += tile.sum(1)
            if rows != columns:
                sums[columns] += tile.sum(0)
        return sums.log_()
    lse = z.new_full((len(z),), -torch.inf)
    for rows, columns, tile in _tiles(z, temperature):
        lse[rows] = torch.logaddexp(lse[rows], torch.logsumexp(tile, 1))
        if rows != columns:
            lse[columns] = torch.logaddexp(lse[columns], torch.logsumexp(tile, 0))
    return lse


def lse_streaming_backward(grad: Tensor, z: Tensor, lse: Tensor, temperature: float) -> Tensor:
    """The gradient of `lse_streaming` with respect to z, from that of its result.

    With p_ij = exp(z_i·z_j/τ − lse_i) it is Σ_{j ≠ i} (grad_i p_ij + grad_j p_ji) z_j / τ.
    """
    dz = torch.zeros_like(z, memory_format=torch.contiguous_format)
    safe = len(z) > 1 and _safe(z, temperature)
    scale = grad * torch.exp(-lse) if safe else grad
    spare = z.new_empty(min(_TILE, len(z)) ** 2)
    for rows, columns, tile in _tiles(z, temperature):
        weights = spare[: tile.numel()].view_as(tile)
        if safe:
            torch.add(scale[rows, None], scale[columns], out=weights)
            weights.mul_(tile.exp_())
        else:
            torch.sub(tile, lse[rows, None], out=weights).exp_().mul_(grad[rows, None])
            weights.addcmul_(tile.sub_(lse[columns]).exp_(), grad[columns])
        dz[rows].addmm_(weights, z[columns])
        if rows != columns:
            dz[columns].addmm_(weights.T, z[rows])
    return dz.div_(temperature)


def _safe(z: Tensor, temperature: float) -> bool:
    # looking at values on an accelerator would make the host wait
    return z.device.type == "cpu" and bool(z.square().sum(1).max() < _SAFE * temperature)


def _tiles(z: Tensor, temperature: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and z_i·z_j/τ between them, −inf for i = j; the next tile overwrites it."""
    count = len(z)
    buffer = z.new_empty(min(_TILE, count) ** 2)
    parts = [slice(lo, min(lo + _TILE, count)) for lo in range(0, count, _TILE)]
    for k, rows in enumerate(parts):
        scaled = z[rows] / temperature
        for columns in parts[k:]:
            n, m = len(scaled), columns.stop - columns.start
            tile = torch.mm(scaled, z[columns].T, out=buffer[: n * m].view(n, m))
            if rows == columns:
                tile.fill_diagonal_(-torch.inf)
            yield rows, columns, tile
