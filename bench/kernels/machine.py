"""Describe the machine: device, highest copy and product rates, clocks, memory."""

import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def device() -> torch.device:
    """The GPU, unless Triton's interpreter is to stand in for it."""
    gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    return torch.device("cuda" if gpu else "cpu")


def set_precision(dtype: str) -> torch.dtype:
    """Make products of float32 exact, or of tf32; return the dtype of the features."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    return torch.bfloat16 if dtype == "bf16" else torch.float32


def describe() -> dict[str, Any]:
    where = device()
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else _processor()
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "device": name,
        "kind": where.type,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda if where.type == "cuda" else None,
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def seconds(run: Callable[[], object], where: torch.device) -> float:
    """Of one run: on a GPU between two events, from an idle device; on a CPU of all threads.

    A CPU's cores may be busy with other work, which makes the time that passes meaningless.
    """
    if where.type != "cuda":
        start = time.process_time()
        run()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(where)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(where)
    return begin.elapsed_time(end) / 1000


def ceilings(dtypes: list[str]) -> dict[str, float]:
    """Bytes/s of a copy (read and written), and FLOP/s of a large product in each dtype."""
    where = device()
    gpu = where.type == "cuda"
    count, size = (1 << 28, 8192) if gpu else (1 << 25, 2048)
    if os.environ.get("TRITON_INTERPRET") == "1":
        count, size = 1 << 20, 256
    found = {"bytes": _copy_rate(count, where)}
    for dtype in dtypes:
        kind = set_precision(dtype)
        x, y = (torch.randn(size, size, device=where).to(kind) for _ in range(2))
        found[dtype] = 2 * size**3 / _best(lambda x=x, y=y: x @ y, where)  # type: ignore[misc]
    return found


def _copy_rate(count: int, where: torch.device) -> float:
    a = torch.randn(count, device=where)
    b = torch.empty_like(a)
    return 8 * count / _best(lambda: b.copy_(a), where)


def _best(run: Callable[[], object], where: torch.device) -> float:
    for _ in range(3):
        run()
    return median(seconds(run, where) for _ in range(7))


def free_bytes() -> float:
    """Memory that a rival may take."""
    where = device()
    if where.type == "cuda":
        idle = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
        return torch.cuda.mem_get_info(where)[0] + idle
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return float("inf")


def peak_bytes(run: Callable[[], object]) -> int | None:
    """The most that a run takes beyond what is held before it; None where it cannot be told."""
    where = device()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        run()
        torch.cuda.synchronize(where)
        return torch.cuda.max_memory_allocated(where) - before
    _trim()
    try:
        _CLEAR.write_text("5")  # Linux: the peak starts anew at the present size
    except OSError:
        run()
        return None
    before = _status("VmRSS")
    run()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def tidy() -> None:
    """Give back what nobody holds, so that it counts for no one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _trim()


def _trim() -> None:
    """Give freed memory back to the system, so that it does not hide what is taken next."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def rms_error(ours: Tensor, truth: Tensor) -> float:
    """RMS of the difference over RMS of the truth; NaN never passes for small."""
    gap = (ours.detach().double() - truth.detach().double()).square().mean().sqrt()
    scale = truth.detach().double().square().mean().sqrt().clamp_min(1e-30)
    return float(gap / scale)
