"""Features whose columns differ by orders of magnitude, brought to one scale before a model."""

import torch
from torch import Tensor, nn

from hmil_fast.kernels.gated_attention_pool.chunked import Chunks

NAME = "feature_scale"


class FeatureScale(nn.Module):
    """(x − mean) / deviation, per column; a column that never varied becomes 0.

    It is kept in the model under `NAME`, and so in its checkpoint. Models know nothing of it: what
    they are given goes through `scaled`.

    Attributes:
        mean: float32 [D].
        factor: 1 / deviation, or 0, float32 [D].
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("factor", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, D] of any float dtype, as float32."""
        return (x.float() - self.mean) * self.factor


def scaled(model: nn.Module, x: Tensor | Chunks) -> Tensor | Chunks:
    """Features [N, D], or chunks of them, as the model was trained on them."""
    scale = getattr(model, NAME, None)
    if scale is None:
        return x
    return scale(x) if isinstance(x, Tensor) else _Scaled(x, scale)


class _Scaled:
    def __init__(self, chunks: Chunks, scale: FeatureScale) -> None:
        self._chunks, self._scale = chunks, scale

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, k: int) -> Tensor:
        x = self._chunks[k].to(self._scale.mean.device, non_blocking=True)
        found: Tensor = self._scale(x)
        return found
