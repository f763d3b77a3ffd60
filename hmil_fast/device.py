"""Choose the device and the precision, and measure free memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from hmil_fast.errors import UsageError

# controllers of a line in /proc/self/cgroup: the mount of their groups; the files of a group's
# limit and use, and the number in memory.stat of what is used but can be freed
_GROUPS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def pick_device(name: str, threads: int = 0) -> torch.device:
    """Choose the device; "auto" is the GPU where there is one, of each rank its own.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:i".
        threads: Threads of products on a CPU, for the whole process; 0 leaves their number.

    Raises:
        UsageError: This machine has no such device.
    """
    if threads:
        torch.set_num_threads(threads)
    if name in ("auto", "cuda"):
        own = int(os.environ.get("LOCAL_RANK", "0"))
        if name == "auto" and not torch.cuda.is_available():
            return torch.device("cpu")
        name = f"cuda:{own}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used: {reason}", "use auto, or cpu") from None
    return device


def amp(device: torch.device, precision: str = "auto") -> torch.autocast:
    """Autocast to bf16 if `precision` says so; weights, sums and results stay fp32.

    Args:
        device: Where the model runs.
        precision: "fp32", "bf16", or "auto": bf16 where `computes_in_bf16`.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=is_bf16(device, precision))


def is_bf16(device: torch.device, precision: str = "auto") -> bool:
    """Whether a precision, as in `amp`, is bf16 on this device."""
    return computes_in_bf16(device) if precision == "auto" else precision == "bf16"


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has instructions to multiply in bf16.

    A capability and no measurement, so that a run does the same again. On a CPU with AVX512-BF16
    a training step took 0.44 of the time in float32 (EPYC, one thread); one without would emulate.
    """
    if device.type == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in names)
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that may still be used: of the GPU, or of main memory within the process's limits.

    Args:
        device: A GPU or the CPU.
        root: The folder that holds proc/ and sys/.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = _numbers(root / "proc/meminfo").get("MemAvailable:", 2**23) * 1024
    return max(0, min([available, *_free_in_groups(root)]))


def _free_in_groups(root: Path) -> Iterator[int]:
    """Bytes free below the limit of each control group that holds this process, version 1 and 2.

    Groups are nested: Slurm limits a job, a step in it and a task in that. In a container the path
    may be the host's: groups that cannot be seen are passed over, up to the one that is mounted.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in _GROUPS:
            continue
        mount, limit, used, unused = _GROUPS[controllers]
        steps = Path(path.lstrip("/"))
        for step in (steps, *steps.parents):
            group = root / "sys/fs/cgroup" / mount / step
            try:
                free = int((group / limit).read_text()) - int((group / used).read_text())
            except (OSError, ValueError):  # no such group, or "max"
                continue
            yield free + _numbers(group / "memory.stat").get(unused, 0)


def driver_version() -> str:
    """Release of the NVIDIA driver, such as "580.65.06"; "unknown" where the system names none."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return "unknown"


def local_ranks() -> int:
    """Processes of this training on this machine."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
