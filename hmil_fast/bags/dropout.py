"""Dropout on the input of a training step: whole instances of bags, entries of the features."""

import torch
from torch import Tensor

from hmil_fast.kernels.gated_attention_pool.chunked import Chunks


def drop_instances(
    x: Tensor | Chunks, bags: Tensor, share: float
) -> tuple[Tensor | Chunks, Tensor]:
    """Leave out instances at random; the host does not wait for the device.

    The host draws how many a bag keeps, at least one, the device which: so every instance is left
    out with the same probability, whatever becomes of others. A bag in chunks keeps all.

    Args:
        x: [N, D] packed bags, or the chunks of one bag.
        bags: int64 [B, 2], (start, length) of bags that follow one another and fill x, on the CPU.
        share: Probability of leaving an instance out, in [0, 1).

    Returns:
        The instances that are left, those of a bag in random order, and their bags.
    """
    if not share or not isinstance(x, Tensor):
        return x, bags
    lengths = bags[:, 1]
    drawn = torch.binomial(lengths.double(), torch.full(lengths.shape, 1 - share).double())
    kept = torch.minimum(drawn.long().clamp_min(1), lengths)
    ends = kept.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    number, count = _on(x.device, torch.arange(len(bags)), lengths)
    bag = torch.repeat_interleave(number, count, output_size=len(x))
    # sorted by bag + u, the instances of a bag are shuffled in its place
    order = (bag + torch.rand(len(x), dtype=torch.float64, device=x.device)).argsort()
    shift, count = _on(x.device, bags[:, 0] - (ends - kept), kept)
    first = torch.repeat_interleave(shift, count, output_size=total)
    chosen = order[first + torch.arange(total, device=x.device)]
    return x[chosen], torch.stack([ends - kept, kept], 1)


def _on(device: torch.device, *small: Tensor) -> list[Tensor]:
    """Copies that the host need not wait for."""
    if device.type != "cuda":
        return [t.to(device) for t in small]
    return [t.pin_memory().to(device, non_blocking=True) for t in small]


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
