"""Distributed training: process group, barrier, all-reduce and broadcast; no-ops without torchrun.

Rank 0 alone reads the run folder and decides what to do; other ranks get its decision by
`broadcast`. A rank that read the folder itself could be late, and read what rank 0 has changed.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from hmil_fast.errors import UsageError
from hmil_fast.models.output import HmilOutput

PATIENCE = timedelta(hours=2)  # the first process predicts and evaluates while the others wait


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group if torchrun started several processes; `finish` leaves it.

    Control messages (stop, save) use gloo between hosts, so that no GPU waits for them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _together():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE
        )
        _hosts()
    try:
        with _together():
            yield
    except BaseException:
        distributed.destroy_process_group()
        raise


@lru_cache(maxsize=1)
def _hosts() -> Any:
    """Return a gloo group of all processes, for monitored barriers; a collective call."""
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


@contextmanager
def _together() -> Iterator[None]:
    """Turn an error of a collective into a message that another process is missing."""
    try:
        yield
    except distributed.DistError as error:
        raise _alone(error) from None
    except RuntimeError as error:
        if "gloo" not in str(error) and "monitoredBarrier" not in str(error):
            raise
        raise _alone(error) from None


def _alone(error: Exception) -> UsageError:
    here = f"process {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"
    return UsageError(
        f"{here} timed out waiting for the others: {str(error).splitlines()[0][:300]}",
        "look at the output of the others, or at the log of the machine that is missing; the same "
        "command resumes",
    )


def finish() -> None:
    """Barrier, then `os._exit(0)`: torch threads can abort a normal exit. No-op for one process."""
    if world_size() > 1:
        with _together():
            wait_for_all()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def world_size() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; rank 0 alone writes."""
    if distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", "0"))  # torchrun states it before the group is set up


def wait_for_all() -> None:
    """Barrier over all processes.

    Raises:
        RuntimeError: Some did not arrive within `PATIENCE`; names them.
    """
    if world_size() > 1:
        distributed.monitored_barrier(_hosts(), PATIENCE, wait_all_ranks=True)


def broadcast(
    value: Any, tensors: Mapping[str, Tensor] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """Send a value and tensors of rank 0 to all processes.

    Args:
        value: Anything JSON-able; ignored on other ranks.
        tensors: On the CPU, of any dtypes and shapes.

    Returns:
        Both, as rank 0 gave them.
    """
    received = dict(tensors or {}) if rank() == 0 else {}
    if world_size() == 1:
        return value, received
    kinds = {
        name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in received.items()
    }
    text = json.dumps([value, kinds]).encode() if rank() == 0 else b""
    size = torch.tensor([len(text)])
    distributed.broadcast(size, 0)
    message = torch.frombuffer(bytearray(text or bytes(int(size))), dtype=torch.uint8)
    distributed.broadcast(message, 0)
    value, kinds = json.loads(bytes(message.tolist()))
    for name, (dtype, shape) in kinds.items():
        if rank():
            received[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        if received[name].numel():
            distributed.broadcast(received[name].reshape(-1).view(torch.uint8), 0)
    wait_for_all()
    return value, received


def dist_max(flags: Sequence[int]) -> list[int]:
    """Return the maximum of each flag over all processes."""
    if world_size() == 1:
        return list(flags)
    greatest = torch.tensor(flags)
    distributed.all_reduce(greatest, distributed.ReduceOp.MAX)
    return [int(flag) for flag in greatest.tolist()]


def dist_sum(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum scalars of the same names over all processes."""
    if world_size() == 1 or not values:
        return values
    total = torch.stack(list(values.values()))
    distributed.all_reduce(total)
    return dict(zip(values, total.unbind(), strict=True))


def dist_rows(rows: NDArray[np.float64], places: Sequence[int], count: int) -> NDArray[np.float64]:
    """Gather rows of all processes into [count, K]; `places` are those of this process's rows."""
    gathered = np.zeros((count, rows.shape[1]))
    gathered[list(places)] = rows
    if world_size() > 1:
        distributed.all_reduce(torch.from_numpy(gathered))
    return gathered


def scale_gradients(output: HmilOutput, share: float) -> HmilOutput:
    """Scale gradients of per-rank means so that averaging over ranks equals one process.

    Args:
        output: Of the model, for this process's bags.
        share: Share of the batch's bags that this process has; gradients are scaled by `share`
            times the number of processes. Those of the embeddings are not: the contrastive loss
            is over the bags of all processes already.
    """
    if world_size() == 1:
        return output

    def scaled(value: Tensor) -> Tensor:
        if not value.requires_grad:
            return value
        view = value.view_as(value)  # a hook on the value itself would run for other uses too
        view.register_hook(partial(torch.mul, share * world_size()))  # type: ignore[no-untyped-call]
        return view

    logits, maps, lse = (
        tuple(map(scaled, level)) for level in (output.logits, output.attention_logits, output.lse)
    )
    alone = None if output.auxiliary is None else scaled(output.auxiliary)
    return HmilOutput(logits, maps, lse, output.embeddings, alone)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """All-reduce the gradients to their mean over all processes, in one message.

    DistributedDataParallel needs every parameter to be used on every rank; a rank without bags, or
    without tiles, uses few. The message is a few MB per step, too short to overlap with the
    backward pass.
    """
    if world_size() == 1:
        return
    own = list(parameters)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
    flat = torch.cat([grad.flatten() for grad in grads])
    distributed.all_reduce(flat)
    flat /= world_size()
    for p, part in zip(own, torch.split(flat, [p.numel() for p in own]), strict=True):
        p.grad = part.view_as(p)
