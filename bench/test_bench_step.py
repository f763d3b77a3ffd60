"""One training step on packed bags: folded and pooled at once, against the published formulas."""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from hmil_fast.labels import LabelTree
from hmil_fast.losses import HmilLoss
from hmil_fast.models.hmil import HMIL

_TREE = LabelTree.from_nested(
    {"benign": ["N", "PB", "UDH"], "atypical": ["FEA", "ADH"], "malignant": ["DCIS", "IC"]}
)
_DIM = 1024


def _step(form: str, bags: int, instances: int) -> Callable[[], None]:
    """Forward, loss and backward in float32, from random features."""
    torch.manual_seed(0)
    model = HMIL(_DIM, _TREE.num_classes)
    loss = HmilLoss(_TREE)
    x = torch.randn(bags * instances, _DIM)
    spans = torch.tensor([[k * instances, instances] for k in range(bags)])
    targets = torch.from_numpy(_TREE.ancestors()).T[torch.arange(bags) % 7]
    forward = model.forward if form == "folded" else model.forward_unfolded

    def step() -> None:
        model.zero_grad()
        loss(forward(x, spans), spans, targets, 50, 200).total.backward()

    return step


@pytest.mark.parametrize(("bags", "instances"), [(64, 50), (64, 500), (4, 10_000)])
@pytest.mark.parametrize("form", ["folded", "unfolded"])
def test_train_step(benchmark: BenchmarkFixture, form: str, bags: int, instances: int) -> None:
    benchmark.group = f"train step, {bags} bags of {instances}"
    benchmark.extra_info.update(threads=torch.get_num_threads(), dtype="float32", dim=_DIM)
    benchmark.pedantic(_step(form, bags, instances), rounds=5, warmup_rounds=1)
