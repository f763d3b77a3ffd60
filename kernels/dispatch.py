"""Choose the implementation of the kernels (fused or reference) and say why."""

import importlib.util
import os
import warnings
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from hmil_fast.kernels.verdict import Verdict

SWITCH = "HMIL_KERNELS"


class Choice(NamedTuple):
    """An implementation and why it was chosen.

    Attributes:
        name: "fused" (Triton) or "reference" (torch).
        why: In few words.
        verdict: Of the check, if that decided.
    """

    name: str
    why: str
    verdict: "Verdict | None" = None


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def exact_products() -> bool:
    """Whether torch is set to multiply float32 in its full precision on a GPU, not in tf32."""
    # torch.get_float32_matmul_precision raises where the newer settings were used; these say both
    return bool(torch.backends.cuda.matmul.fp32_precision != "tf32")


def choose(device: torch.device) -> Choice:
    """The implementation for tensors on a device.

    Fused on a GPU from sm_80 on that passes a check: at first use all fused kernels run forward and
    backward on small bags in a process of its own, and every output must be close to float64
    (`hmil_fast.kernels.verdict`). That takes as long as compiling them, some 20 seconds, once
    for a GPU model, driver, release and code; then the verdict is read from a file, and after the
    first call it is in memory. A GPU that fails runs the reference, and a warning gives the
    numbers. No time is measured: the choice is the same on every machine with that GPU.

    Ranks of a job choose each for itself. If one falls back where others do not, the job is still
    right, as both compute the same; it is as slow as that rank.

    HMIL_KERNELS=reference and HMIL_KERNELS=fused choose without a check; fused on a CPU needs
    TRITON_INTERPRET=1, is slow and meant for tests.

    Raises:
        ValueError: HMIL_KERNELS says neither, or asks for what cannot run here.
    """
    # other kernels of float32 are another check
    exact = device.type != "cuda" or exact_products()
    return _choice(device, os.environ.get(SWITCH, ""), interpreted(), exact)


@cache  # choose() is called for every operation of every step; `exact` is a part of the key only
def _choice(device: torch.device, wish: str, interpreted: bool, exact: bool) -> Choice:
    if wish not in ("", "reference", "fused"):
        raise ValueError(f"{SWITCH} is {wish!r}; set it to reference or fused, or unset it")
    if wish == "reference":
        return Choice("reference", f"{SWITCH}=reference")
    obstacle = _obstacle(device, wish, interpreted)
    if wish == "fused" and obstacle:
        raise ValueError(f"{SWITCH} is 'fused', but {obstacle}; unset it or set it to reference")
    if wish == "fused":
        return Choice("fused", f"{SWITCH}=fused")
    if obstacle:
        return Choice("reference", obstacle)
    # not above: it imports this file
    from hmil_fast.kernels.verdict import find

    return judged(find(device), _named(device))


def judged(verdict: "Verdict", gpu: str) -> Choice:
    """Fused if the check passed; else the reference, with a warning."""
    if verdict.passed:
        return Choice("fused", "its check passed", verdict)
    warnings.warn(
        f"the fused kernels fail their check on {gpu}; the reference runs in their place, as right "
        f"but slower. {SWITCH}=reference chooses it without a check. Found: {verdict.text()}",
        RuntimeWarning,
        stacklevel=2,
    )
    return Choice("reference", "the check of the fused kernels failed", verdict)


def _obstacle(device: torch.device, wish: str, interpreted: bool) -> str:
    """Why the fused kernels do not run; empty if they do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        return "" if wish and interpreted else "the tensors are on a CPU"
    if device.type != "cuda" or torch.version.hip:
        return f"there are no kernels for {device.type if device.type != 'cuda' else 'ROCm'}"
    if interpreted:
        return "TRITON_INTERPRET=1 is for tests on a CPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{_named(device)} is older than sm_80"
    return ""


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
