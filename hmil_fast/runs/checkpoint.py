"""Write and read checkpoints: safetensors with JSON in the header, no pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hmil_fast.errors import UsageError
from hmil_fast.files import write_file


def save_checkpoint(
    path: Path,
    model: nn.Module,
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    more: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a checkpoint under its final name in one step.

    Args:
        path: The .safetensors file.
        model: Its parameters are stored as `model.<name>`.
        state: Anything JSON-able: epoch, best score, class counts.
        optimizer: Its moments are stored as `optimizer.<parameter>.<moment>`.
        more: Other tensors, stored as `<group>.<name>`; `group_of` finds them again.
    """
    groups: dict[str, Mapping[str, Tensor]] = {"model": model.state_dict(), **(more or {})}
    if optimizer is not None:
        moments = optimizer.state_dict()["state"].items()
        groups["optimizer"] = {f"{i}.{k}": v for i, own in moments for k, v in own.items()}
    tensors = {
        f"{group}.{name}": value.detach().cpu().contiguous()
        for group, values in groups.items()
        for name, value in values.items()
    }
    data = save(tensors, {"state": json.dumps(state)})  # its own files only their owner may read
    write_file(path, lambda partial: partial.write_bytes(data))


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
            f"cannot read the checkpoint {path}: {error.strerror}",
            "check the path and its permissions",
        ) from None
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UsageError(
            f"cannot read the checkpoint {path}: {error}",
            "delete it and run `hmil-fast train` again, it trains what is missing",
        ) from None


def group_of(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """The tensors of one group of a checkpoint, by their own names."""
    prefix = f"{group}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def restore(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a checkpoint's tensors back into a model and, if given, its optimiser.

    Raises:
        UsageError: They are those of another model.
    """
    load_module(model, group_of(tensors, "model"))
    if optimizer is None:
        return
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in group_of(tensors, "optimizer").items():
        i, name = key.split(".")
        moments.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def load_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put parameters and buffers back into a module.

    Raises:
        UsageError: They are those of another one.
    """
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise UsageError(
            f"a checkpoint does not fit the run's model: {error}",
            "restore config.yaml if it was edited; else train again, with another --out",
        ) from None
