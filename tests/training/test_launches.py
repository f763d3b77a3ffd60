"""Count the operations that torch dispatches in a training step; on a GPU most are a launch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST = 300  # 362 before SupCon's gradient was written out

COUNT = """
import torch
from collections import Counter
from torch.utils._python_dispatch import TorchDispatchMode
from bench.first_gpu.training import training_step

NO_WORK = {"empty", "empty_like", "new_empty", "empty_strided", "_local_scalar_dense",
           "_record_function_enter_new", "_record_function_exit", "detach", "_unsafe_view"}

class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name not in NO_WORK and not function.is_view:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))

once = training_step(4, torch.device("cpu"), dim=32, hidden=16)
once()
with Count() as count:
    once()
print(count.found)
print(count.found.total(), count.found["gated_attention_pool"])
"""


@pytest.mark.slow
def test_a_step_of_64_bags_launches_few_kernels() -> None:
    """Pooling and SupCon count as the ops that run fused; operations of the host count too."""
    env = {"TRITON_INTERPRET": "1", "HMIL_KERNELS": "fused", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT], cwd=ROOT, env=os.environ | env, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    total, pooled = map(int, done.stdout.splitlines()[-1].split())
    assert pooled == 1, "the step did not run the op of the fused kernels"
    assert total <= MOST, done.stdout
