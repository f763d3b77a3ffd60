"""Measure a training step: time of host and device, and launches; and SupCon over many rows."""

import os
import time
from collections.abc import Callable

import torch

from bench.first_gpu.inputs import LEAVES
from bench.first_gpu.journal import device, dry, folder, say, wait
from hmil_fast.bags.dropout import drop_features, drop_instances
from hmil_fast.device import amp
from hmil_fast.kernels.supcon import supcon as supcon_loss
from hmil_fast.labels import LabelTree
from hmil_fast.losses import HmilLoss
from hmil_fast.models.hmil import HMIL
from hmil_fast.recipe import PRESETS

BAGS = 64


def step() -> None:
    """A step of preset best on 64 bags, fused and reference."""
    for kernels in ("reference",) if dry() else ("fused", "reference"):
        os.environ["HMIL_KERNELS"] = kernels
        for rows in (20,) if dry() else (500, 4096):
            _measure(kernels, rows)


def training_step(
    rows: int, place: torch.device, dim: int = 1024, hidden: int = 256
) -> Callable[[], None]:
    """A call that trains preset best on 64 bags of `rows` instances once."""
    recipe = PRESETS["best"]
    tree = LabelTree.from_nested(
        {"benign": ["N", "PB", "UDH"], "atypical": ["FEA", "ADH"], "malignant": ["DCIS", "IC"]}
    )
    torch.manual_seed(0)
    model = HMIL(dim, tree.num_classes, readout=recipe.readout, hidden=hidden).to(place)
    loss = HmilLoss(tree, recipe, [1] * len(LEAVES)).to(place)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(BAGS * rows, dim, device=place).half()
    bags = torch.stack([torch.arange(BAGS) * rows, torch.full((BAGS,), rows)], 1)
    leaves = torch.arange(BAGS) % len(LEAVES)
    targets = torch.from_numpy(tree.ancestors()).T[leaves].to(place)

    def once() -> None:
        kept, kept_bags = drop_instances(x, bags, recipe.instance_dropout)
        kept = drop_features(kept, recipe.feature_dropout)
        with amp(place, "bf16"):
            output = model(kept, kept_bags)
        total = loss(output, kept_bags, targets, 10, 200).total
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        optimiser.step()

    return once


def _measure(kernels: str, rows: int) -> None:
    once, count = training_step(rows, device(), 64 if dry() else 1024), 2 if dry() else 30
    for _ in range(1 if dry() else 5):
        once()
    wait()
    began = time.perf_counter()
    for _ in range(count):
        once()
    host = (time.perf_counter() - began) / count
    wait()
    wall = (time.perf_counter() - began) / count
    spent = {}
    if not dry():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(5):
                once()
            wait()
        on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        spent = {
            "device_ms": sum(e.device_time for e in on_device) / 5e3,
            "launches": len(on_device) / 5,
        }
        top = sorted(profile.key_averages(), key=lambda e: -e.device_time_total)[:15]
        lines = [f"{e.device_time_total / 5e3:.3f} ms {e.count // 5} {e.key[:100]}" for e in top]
        (folder() / f"step-{kernels}-{rows}.txt").write_text("\n".join(lines))
        spent["longest"] = lines[:5]
    say(
        "step", kernels=kernels, bags=BAGS, rows=rows, host_ms=1e3 * host, wall_ms=1e3 * wall,
        instances_per_s=BAGS * rows / wall, **spent,
    )  # fmt: skip


def supcon() -> None:
    """SupCon's forward pass and step up to 65,536 rows of 256."""
    torch.set_float32_matmul_precision("high")
    for rows in (64,) if dry() else (448, 16_384, 65_536):
        z = torch.nn.functional.normalize(torch.randn(rows, 256, device=device()), dim=1)
        z.requires_grad_()
        labels = torch.arange(rows, device=device()) % 7
        took = {}
        for name, call in (
            ("forward_ms", lambda z=z, y=labels: supcon_loss(z, y, 0.1)),
            ("step_ms", lambda z=z, y=labels: torch.autograd.grad(supcon_loss(z, y, 0.1), z)),
        ):
            call()
            wait()
            began, count = time.perf_counter(), 2 if dry() else 10
            for _ in range(count):
                call()
            wait()
            took[name] = 1e3 * (time.perf_counter() - began) / count
        peak = 0 if dry() else torch.cuda.max_memory_allocated() / 2**20
        say("supcon", rows=rows, **took, peak_mib=peak)
