"""The processes of one training: `torchrun` starts them, each works on a share of every batch.

Without torchrun there is one, and nothing here does anything.

The first one alone reads what a run folder holds and decides what is to be done; the others get its
decision by `from_first`. A process that looked for itself might come late, and find what the first
one has changed meanwhile.
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
    """Join the other processes, if torchrun started more than this one; `finish` ends that well.

    What steers (stop, save) goes by gloo, from host to host, and makes no GPU wait.
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
    """The processes as hosts, for what only gloo can do; all ask for it at one moment."""
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


@contextmanager
def _together() -> Iterator[None]:
    """Say in words that another process is missing or has ended."""
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
        f"{here} has waited for the others in vain: {str(error).splitlines()[0][:300]}",
        "see what the others said, or the log of the machine that is missing; the same command "
        "resumes",
    )


def finish() -> None:
    """End this process with success, once all have come here; does nothing for a single one.

    At once, since torch's threads have been seen to abort an ordinary exit.
    """
    if world_size() > 1:
        with _together():
            wait_for_all()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def world_size() -> int:
    """How many processes train."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; rank 0 alone writes."""
    if distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", "0"))  # torchrun states it before the group is set up


def wait_for_all() -> None:
    """Go on when every process has come here.

    Raises:
        RuntimeError: Some have not in the time of `PATIENCE`; it says which.
    """
    if world_size() > 1:
        distributed.monitored_barrier(_hosts(), PATIENCE, wait_all_ranks=True)


def from_first(
    value: Any, tensors: Mapping[str, Tensor] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """What the first process gives, on every process, once all have it.

    Args:
        value: Anything JSON-able; that of the other processes is not looked at.
        tensors: On the CPU, of any dtypes and shapes.

    Returns:
        Both, as the first process gave them.
    """
    found = dict(tensors or {}) if rank() == 0 else {}
    if world_size() == 1:
        return value, found
    kinds = {
        name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in found.items()
    }
    text = json.dumps([value, kinds]).encode() if rank() == 0 else b""
    size = torch.tensor([len(text)])
    distributed.broadcast(size, 0)
    message = torch.frombuffer(bytearray(text or bytes(int(size))), dtype=torch.uint8)
    distributed.broadcast(message, 0)
    value, kinds = json.loads(bytes(message.tolist()))
    for name, (dtype, shape) in kinds.items():
        if rank():
            found[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        if found[name].numel():
            distributed.broadcast(found[name].reshape(-1).view(torch.uint8), 0)
    wait_for_all()
    return value, found


def agree(flags: Sequence[int]) -> list[int]:
    """The greatest value of each flag over all processes."""
    if world_size() == 1:
        return list(flags)
    greatest = torch.tensor(flags)
    distributed.all_reduce(greatest, distributed.ReduceOp.MAX)
    return [int(flag) for flag in greatest.tolist()]


def add_up(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all processes of scalars that each has under the same names."""
    if world_size() == 1 or not values:
        return values
    total = torch.stack(list(values.values()))
    distributed.all_reduce(total)
    return dict(zip(values, total.unbind(), strict=True))


def collect(rows: NDArray[np.float64], places: Sequence[int], count: int) -> NDArray[np.float64]:
    """Rows of all processes [count, K], each put in its place by the one process that has it."""
    everything = np.zeros((count, rows.shape[1]))
    everything[list(places)] = rows
    if world_size() > 1:
        distributed.all_reduce(torch.from_numpy(everything))
    return everything


def weigh(output: HmilOutput, share: float) -> HmilOutput:
    """The output, of which means over a process's own bags count as their share of the batch.

    Processes average their gradients, so a mean over a share of the bags must count `share` times
    the number of processes for the sum to be that of one process with the whole batch. The
    contrastive rows are left alone: their loss is over the bags of all processes already.
    """
    if world_size() == 1:
        return output

    def weighed(value: Tensor) -> Tensor:
        if not value.requires_grad:
            return value
        seen = value.view_as(value)  # what the model itself made of the value counts once
        seen.register_hook(partial(torch.mul, share * world_size()))  # type: ignore[no-untyped-call]
        return seen

    logits, maps, lse = (
        tuple(map(weighed, level)) for level in (output.logits, output.attention_logits, output.lse)
    )
    alone = None if output.auxiliary is None else weighed(output.auxiliary)
    return HmilOutput(logits, maps, lse, output.embeddings, alone)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Put the mean over all processes in place of each gradient, in one message.

    DistributedDataParallel wants every parameter used by every process; one that has no bag, or
    none with tiles, uses few. The message is a few MB once a step: nothing to hide behind the
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
