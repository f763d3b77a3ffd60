"""Checkpoints: tensors as safetensors, everything else as JSON in the file's header; no pickle."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hmil_fast.errors import UsageError


def save_checkpoint(
    path: Path, model: nn.Module, state: dict[str, Any], optimizer: torch.optim.Adam | None = None
) -> None:
    """Write a checkpoint under its final name in one step.

    Args:
        path: The .safetensors file.
        model: Its parameters are stored as `model.<name>`.
        state: Anything JSON-able: epoch, best score, class counts.
        optimizer: Its moments are stored as `optimizer.<parameter>.<moment>`.
    """
    tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if optimizer is not None:
        for i, moments in optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                tensors[f"optimizer.{i}.{name}"] = value.detach().cpu().contiguous()
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(tensors, partial, metadata={"state": json.dumps(state)})
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o666 & ~umask)  # safetensors lets nobody else read it
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a checkpoint, on the CPU, and its state.

    Raises:
        UsageError: The file is missing or damaged.
    """
    try:
        path.open("rb").close()  # safetensors calls what may not be read missing
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, dict(state)  # noqa: SIM118
    except OSError as error:
        raise UsageError(
            f"cannot read the checkpoint {path}: {error.strerror}", "mend that, then try again"
        ) from None
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UsageError(
            f"cannot read the checkpoint {path}: {error}",
            "delete it and run `hmil-fast train` again, it trains what is missing",
        ) from None


def restore(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Adam | None = None
) -> None:
    """Put a checkpoint's tensors back into a model and, if given, its optimiser.

    Raises:
        UsageError: They are those of another model.
    """
    prefix = "model."
    own = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise UsageError(
            f"a checkpoint does not fit the run's model: {error}",
            "delete it and run `hmil-fast train` again, it trains what is missing",
        ) from None
    if optimizer is None:
        return
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            moments.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
