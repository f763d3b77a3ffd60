"""Order work on a device by streams and events; on a CPU all work is done when a call returns."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class Event(Protocol):
    """A point in the work of a stream."""

    def query(self) -> bool:
        """Whether the work up to it is done."""
        ...

    def synchronize(self) -> None:
        """Make the host wait until it is."""
        ...


class Stream(Protocol):
    """Work on a device that is done in the order in which it was queued."""

    @property
    def handle(self) -> int:
        """The `cudaStream_t` for other libraries; 0 on a CPU."""
        ...

    def use(self) -> AbstractContextManager[object]:
        """Queue there what torch is asked for within the block."""
        ...

    def record(self) -> Event:
        """The point after all that is queued."""
        ...

    def wait(self, event: Event) -> None:
        """Let what is queued from now on wait for an event, of any stream; the host goes on."""
        ...


class _Done:
    """Of a CPU, whose work is done when the call returns."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


DONE: Event = _Done()


class _CpuStream:
    handle = 0

    def use(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self) -> Event:
        return DONE

    def wait(self, event: Event) -> None:
        event.synchronize()


class _CudaStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    @property
    def handle(self) -> int:
        return int(self._stream.cuda_stream)

    def use(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def record(self) -> Event:
        event: Event = self._stream.record_event()
        return event

    def wait(self, event: Event) -> None:
        if isinstance(event, torch.cuda.Event):
            self._stream.wait_event(event)
        else:
            event.synchronize()


def own_stream(device: torch.device) -> Stream:
    """A new stream beside torch's own; no order holds between the two but by events."""
    return _CudaStream(torch.cuda.Stream(device)) if device.type == "cuda" else _CpuStream()


def current_stream(device: torch.device) -> Stream:
    """The stream that torch queues on."""
    if device.type == "cuda":
        return _CudaStream(torch.cuda.current_stream(device))
    return _CpuStream()
