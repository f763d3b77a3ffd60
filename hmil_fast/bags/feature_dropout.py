"""Dropout of the features themselves, for packed bags and for bags in chunks."""

import torch
from torch import Tensor

from hmil_fast.kernels.gated_attention_pool.parts import Chunks


def drop_features(x: Tensor | Chunks, share: float) -> Tensor | Chunks:
    """Zero entries at random and scale the others up; chunks lose the same ones at every reading.

    Args:
        x: [N, D] features of any float dtype, or chunks of them.
        share: Probability of dropping an entry, taken to the nearest of 256 steps: a byte an entry
            is drawn in a fifth of the time that `torch.nn.functional.dropout` takes on a CPU.
    """
    if not share:
        return x
    if isinstance(x, Tensor):
        return _dropped(x, share, None)
    return _Dropped(x, share, int(torch.randint(2**62, ())))


class _Dropped:
    def __init__(self, chunks: Chunks, share: float, seed: int) -> None:
        self._chunks, self._share, self._seed = chunks, share, seed

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, k: int) -> Tensor:
        x = self._chunks[k]
        return _dropped(x, self._share, torch.Generator(x.device).manual_seed(self._seed + k))


def _dropped(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    steps = round(256 * share)
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
    drawn = words.random_(-(2**63), 2**63 - 1, generator=generator).view(torch.uint8)
    kept = drawn[: x.numel()].view(x.shape) >= steps
    return (x * kept).mul_(256 / max(256 - steps, 1))
