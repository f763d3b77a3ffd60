"""Where the steps put what they found: one JSON line each, in a folder that all of them share."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

DRY, FOLDER = "HMIL_FIRST_GPU_DRY", "HMIL_FIRST_GPU_WORK"


def dry() -> bool:
    """Whether sizes are tiny and a CPU stands for the GPU."""
    return os.environ.get(DRY) == "1"


def folder() -> Path:
    """The folder of inputs, results and logs."""
    return Path(os.environ[FOLDER])


def device() -> torch.device:
    """What is measured."""
    return torch.device("cpu") if dry() else torch.device("cuda", 0)


def wait() -> None:
    """Until the device has done what it was asked for."""
    if not dry():
        torch.cuda.synchronize()


def say(step: str, **facts: Any) -> None:
    """Keep a result."""
    line = json.dumps({"step": step, "at": round(time.time(), 1), **facts})
    with (folder() / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def results() -> list[dict[str, Any]]:
    """All that were kept, in their order."""
    path = folder() / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
