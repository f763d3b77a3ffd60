"""A step of the loss never makes the host wait for the device."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hmil_fast.kernels.supcon.streaming import lse_streaming, lse_streaming_backward
from hmil_fast.labels import LabelTree
from hmil_fast.losses import PRESETS, HmilLoss
from hmil_fast.recipe import Recipe

# what copies a value to the host, or makes a shape depend on one
WAITS = (
    "item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique",
    "_unique2", "unique_dim", "bincount", "repeat_interleave.Tensor",
)  # fmt: skip
MENU: dict[str, Recipe] = {
    **PRESETS,
    "marginal, remembered leaves": replace(
        PRESETS["paper"], hierarchy="marginal", supcon_memory=2, class_weights="balanced"
    ),
    "hxe": replace(PRESETS["best"], hierarchy="hxe", ham="mean", supcon="leaf"),
    "soft": replace(PRESETS["best"], hierarchy="soft", hba="nll", supcon_memory=0),
}


class Calls(TorchDispatchMode):
    """Counts the operations that would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().partition("::")[2]
        waits = name in WAITS or name.partition(".")[0] in WAITS
        self.seen["waits" if waits else "others"] += 1
        # indexing with a mask looks for its entries
        indexes = name.startswith(("index.", "index_put"))
        masks = [i for i in args[1] if i is not None] if indexes else []
        self.seen["waits"] += any(i.dtype in (torch.bool, torch.uint8) for i in masks)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.nonzero(),
    lambda x: torch.equal(x, x), float, lambda x: x.tolist() if x.numel() == 0 else x.max().item(),
])  # fmt: skip
def test_the_count_sees_what_waits(wait: Callable[[torch.Tensor], Any]) -> None:
    with Calls() as calls:
        wait(torch.ones(1))
    assert calls.seen["waits"] > 0


@pytest.mark.parametrize("name", MENU)
def test_a_process_without_bags_adds_nothing(name: str, uneven: LabelTree, batch: Any) -> None:
    """Of several processes one may get no bag of a batch; its gradient must be 0, not NaN."""
    loss = HmilLoss(uneven, MENU[name], [3, 2, 2, 2, 1])
    loss(*batch([0, 1, 2]), 0, 2)
    output, bags, _ = batch([])
    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    output = output._replace(
        logits=(*output.logits[:-1], output.logits[-1] * weight),
        embeddings=output.embeddings * weight[:, None],
    )
    targets = torch.zeros(0, 3, dtype=torch.int64)
    loss(output, bags, targets, 1, 2).total.backward()
    assert weight.grad.tolist() == [0] * 5


@pytest.mark.parametrize("name", MENU)
def test_a_step_reads_no_value(name: str, uneven: LabelTree, batch: Any) -> None:
    loss = HmilLoss(uneven, MENU[name], [3, 2, 2, 2, 1])
    output, bags, targets = batch([0, 1, 2, 2, 4, 3, 1])
    for epoch in (0, 1):  # the second with a memory
        with Calls() as calls:
            loss(output, bags, targets, epoch, 2).total.backward(retain_graph=True)
        assert calls.seen["others"] > 20
        assert calls.seen["waits"] == 0


def test_nor_do_the_sums_of_supcon_where_they_are_no_fused_kernel() -> None:
    with FakeTensorMode():
        z = torch.empty(12, 4, device="cuda")
        lse = lse_streaming(z, 0.1)
        assert lse_streaming_backward(lse, z, lse, 0.1).shape == z.shape


@pytest.mark.parametrize("name", MENU)
def test_a_forward_on_a_gpu_that_has_no_values(name: str, uneven: LabelTree, batch: Any) -> None:
    """Fake CUDA tensors: a value that is read, or a tensor left on the CPU, raises."""
    drawn = batch([0, 1, 2, 2, 4, 3, 1])
    loss = HmilLoss(uneven, MENU[name], [3, 2, 2, 2, 1])
    with FakeTensorMode(allow_non_fake_inputs=True):

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        for module in loss.modules():
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, fake(buffer))
        levels = [tuple(map(fake, parts)) for parts in drawn.output[:3]]
        output = type(drawn.output)(*levels, fake(drawn.output.embeddings))
        for epoch in (0, 1):
            total = loss(output, drawn.bags, fake(drawn.targets), epoch, 2).total
            assert total.device.type == "cuda"
