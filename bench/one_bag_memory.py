"""Measure the peak memory of HMIL beside one bag and its results; print JSON.

A process of its own, so that its peak is that of this call:
`python -m bench.one_bag_memory INSTANCES folded|unfolded inference|training fp32|bf16`.
"""

import json
import sys
from pathlib import Path

import torch

from hmil_fast.models.hmil import HMIL

DIM, CLASSES = 1024, (3, 7)


def call(model: HMIL, x: torch.Tensor, form: str, kind: str, dtype: str) -> None:
    """One forward pass over x as one bag, and for training a backward pass."""
    forward = model.forward if form == "folded" else model.forward_unfolded
    bags = torch.tensor([[0, len(x)]])
    with (
        torch.inference_mode(kind == "inference"),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"),
    ):
        logits = forward(x, bags).logits
    if kind == "training":
        model.zero_grad()
        sum(level.logsumexp(1).sum() for level in logits).backward()


def main() -> None:
    instances, *which = sys.argv[1:]
    torch.manual_seed(0)
    model = HMIL(DIM, CLASSES)
    call(model, torch.randn(64, DIM).half(), *which)  # what the first call brings with it
    x = torch.empty(int(instances), DIM, dtype=torch.float16)
    for part in x.split(4096):
        part.copy_(torch.randn(len(part), DIM))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    call(model, x, *which)
    print(json.dumps({"extra_bytes": resident("VmHWM") - before}))


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


if __name__ == "__main__":
    main()
