"""Nothing in a training step makes the host wait for the device."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.config import MODELS, Runtime
from hmil_fast.training.fold import FoldTrainer

# operations whose result or its shape the host has to know
READS = (
    "local_scalar_dense",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique",
)


class Reads(TorchDispatchMode):
    """Counts operations on one device whose values the host has to know."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if all(tensor.device != self.device for tensor in tensors):
            return out
        name = op.name().split("::")[1].split(".")[0].lstrip("_")
        by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        to_host = any(t.device.type == "cpu" != self.device.type for t in results)
        if name.startswith(READS) or by_mask or unsized or to_host:
            self.found.append(name)
        return out


def test_the_count_sees_what_waits() -> None:
    x = torch.arange(6.0)
    for wait in (
        lambda: x.sum().item(),
        lambda: float(x[0]),
        lambda: bool(x[0]),
        lambda: x[x > 2],
        x.nonzero,
        lambda: torch.repeat_interleave(x, torch.arange(6)),
        x.unique,
    ):
        with Reads(x.device) as reads:
            wait()
        assert reads.found


@pytest.mark.parametrize("model", MODELS)
def test_a_step_reads_nothing_of_the_device(
    tmp_path: Path,
    cohort: Any,
    train_small: Callable[..., Any],
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the meta device every read, by tolist too, and every copy to the host raises."""
    run = train_small(tmp_path / "run", epochs=1, folds=2, model=model, dropout=0.0)
    cache = FeatureCache(cohort.store, [s.slide_id for s in run.slides], tmp_path)
    meta = torch.device("meta")
    # it knows neither autocast nor the fused optimiser, which reads nothing on a GPU
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    adam = torch.optim.Adam

    def unfused(*arguments: Any, **options: Any) -> torch.optim.Adam:
        return adam(*arguments, **{**options, "fused": False})

    monkeypatch.setattr(torch.optim, "Adam", unfused)
    one = FoldTrainer(run, 0, cache, Runtime("meta"), None)
    x = torch.empty(70, 16, dtype=torch.float16, device=meta)
    bags = torch.tensor([[0, 30], [30, 0], [30, 40]])
    targets = torch.zeros(3, 2, dtype=torch.int64, device=meta)
    with pytest.raises((RuntimeError, NotImplementedError)):
        targets.tolist()
    with Reads(meta) as reads:
        for one.epoch in range(2):
            one.train_step(x, bags, targets, 1.0)
    assert reads.found == []
    assert all(p.grad is not None for p in one.model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["device", "host"])
def test_cuda_never_waits_in_a_step(
    tmp_path: Path, cohort: Any, train_small: Callable[..., Any], tier: str
) -> None:
    run = train_small(tmp_path / "run", epochs=1, folds=2)
    device = torch.device("cuda")
    cache = FeatureCache(cohort.store, [s.slide_id for s in run.slides], tmp_path, tier, device)
    one = FoldTrainer(run, 0, cache, Runtime(str(device)), None)
    chosen = [one.train_bags[:6].tolist(), one.train_bags[6:12].tolist()]
    targets = [one.targets[indices].to(device) for indices in chosen]

    def steps() -> None:
        for (x, bags), y in zip(cache.batches(chosen, device), targets, strict=True):
            one.train_step(x, bags, y, 1.0)

    steps()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    total: Tensor = one._sums["total"]
    assert total.isfinite()
