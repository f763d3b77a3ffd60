"""One training step on packed bags: folded and pooled at once, against the published formulas."""

import time
from collections.abc import Callable, Iterator
from statistics import median

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


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch's threads inside an operation, for one test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("bags", "instances"), [(64, 50), (64, 500), (4, 10_000)])
def test_train_step(benchmark: BenchmarkFixture, bags: int, instances: int, threads: int) -> None:
    """Turn by turn, so that a busy machine is as hard on the one as on the other."""
    seconds: dict[str, list[tuple[float, float]]] = {"folded": [], "unfolded": []}

    def timed(form: str) -> Callable[[], None]:
        step = _step(form, bags, instances)

        def run() -> None:
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            seconds[form].append((time.perf_counter() - wall, time.process_time() - cpu))

        return run

    folded, unfolded = timed("folded"), timed("unfolded")
    folded()
    unfolded()
    warm = seconds["folded"].pop()[0] + seconds["unfolded"].pop()[0]
    rounds = min(max(int(6 / warm), 1), 5)  # threads that share cores may take 20 s a round
    benchmark.pedantic(folded, setup=unfolded, rounds=rounds)

    medians = {form: [median(kind) for kind in zip(*s, strict=True)] for form, s in seconds.items()}
    ratios = [u / f for u, f in zip(medians["unfolded"], medians["folded"], strict=True)]
    benchmark.extra_info.update(
        threads=threads, dtype="float32", dim=_DIM, seconds_wall_cpu=medians, ratio_wall_cpu=ratios
    )
    (wall, cpu), (wall_u, cpu_u) = medians["folded"], medians["unfolded"]
    print(
        f"\n{bags} bags of {instances}, {threads} thread(s), {rounds} rounds: "
        f"folded {wall:.3f} s wall, {cpu:.3f} s CPU; unfolded {wall_u:.3f}, {cpu_u:.3f}; "
        f"{ratios[0]:.1f} and {ratios[1]:.1f} times"
    )
