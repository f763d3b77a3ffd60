"""Where a model runs, and in what precision."""

import torch

from hmil_fast.errors import UsageError


def pick_device(name: str) -> torch.device:
    """The device of a run; "auto" is the GPU where there is one.

    Raises:
        UsageError: No such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used: {reason}", "use auto, or cpu") from None
    return device


def amp(device: torch.device) -> torch.autocast:
    """Autocast to bf16 where the hardware computes in it; weights and accumulators stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(device))


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device is a GPU that computes in bf16."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported()
