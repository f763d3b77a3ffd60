"""Choose the implementation of the kernels (fused or reference) and say why."""

import importlib.util
import os
from typing import NamedTuple

import torch

SWITCH = "HMIL_KERNELS"


class Choice(NamedTuple):
    """An implementation, "fused" (Triton) or "reference" (torch), and the reason in few words."""

    name: str
    why: str


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(device: torch.device) -> Choice:
    """The implementation for tensors on a device.

    Reference, until the fused kernels have been measured on a GPU: so far Triton's interpreter and
    its compiler have seen them, no device. HMIL_KERNELS=fused runs them on a GPU from sm_80 on;
    on a CPU that needs TRITON_INTERPRET=1, is slow and meant for tests.

    Raises:
        ValueError: HMIL_KERNELS says neither, or asks for what cannot run here.
    """
    wish = os.environ.get(SWITCH, "")
    if wish not in ("", "reference", "fused"):
        raise ValueError(f"{SWITCH} is {wish!r}; set it to reference or fused, or unset it")
    if wish == "reference":
        return Choice("reference", f"{SWITCH}=reference")
    obstacle = _obstacle(device, wish)
    if wish == "fused" and obstacle:
        raise ValueError(f"{SWITCH} is 'fused', but {obstacle}; unset it or set it to reference")
    if wish == "fused":
        return Choice("fused", f"{SWITCH}=fused")
    unproven = f"the fused kernels are not measured on a GPU yet; {SWITCH}=fused runs them"
    return Choice("reference", obstacle or unproven)


def describe() -> str:
    """One line for people: what runs on this machine, and why."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        choice = choose(device)
    except ValueError as error:
        return str(error)
    return f"{choice.name} on {device.type}: {choice.why}"


def _obstacle(device: torch.device, wish: str) -> str:
    """Why the fused kernels do not run; empty if they do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        return "" if wish and interpreted() else "the tensors are on a CPU"
    if device.type != "cuda" or torch.version.hip:
        return f"there are no kernels for {device.type if device.type != 'cuda' else 'ROCm'}"
    if interpreted():
        return "TRITON_INTERPRET=1 is for tests on a CPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{_named(device)} is older than sm_80"
    return ""


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
