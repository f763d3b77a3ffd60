"""FeatureScale: standardise the columns of the features before a model."""

import torch
from torch import Tensor, nn

from hmil_fast.kernels.gated_attention_pool.chunked import Chunks

NAME = "feature_scale"


class FeatureScale(nn.Module):
    """(x − mean) / deviation, per column; a column that never varied becomes 0.

    A model holds it under `NAME`, so that a checkpoint has it. Callers pass features through
    `scaled` before they call the model.

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
    """Standardise features [N, D], or chunks of them, if the model has a `FeatureScale`."""
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
        scaled_rows: Tensor = self._scale(x)
        return scaled_rows
