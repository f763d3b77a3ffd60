"""The encoder's two input buffers: who waits for whom, without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch

from hmil_fast.extraction.pipeline.batches import StaticBatches
from hmil_fast.extraction.pipeline.slide_job import ActiveSlide
from hmil_fast.streams import Event, current_stream, own_stream

CPU = torch.device("cpu")


@dataclass
class Point:
    """An event of a stream that remembers what its stream was asked for."""

    name: str

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        raise AssertionError("the host waited")


@dataclass
class Recording:
    """A stream that writes down in which order it is asked to wait and to record."""

    name: str
    log: list[str]
    count: int = 0
    handle: int = 0

    @contextmanager
    def use(self) -> Iterator[None]:
        self.log.append(f"{self.name} writes")
        yield

    def record(self) -> Event:
        self.count += 1
        self.log.append(f"{self.name} records {self.name}{self.count}")
        return Point(f"{self.name}{self.count}")

    def wait(self, event: Event) -> None:
        if isinstance(event, Point):
            self.log.append(f"{self.name} waits for {event.name}")


@dataclass
class Rows:
    """What a batch needs to know of a slide."""

    added: int = 0
    log: list[str] = field(default_factory=list)


def test_a_buffer_is_written_again_only_after_its_encoder() -> None:
    log: list[str] = []
    tiles, encoder = Recording("t", log), Recording("e", log)
    batches = StaticBatches(4, 2, CPU, buffers=2, tiles=tiles, encoder=encoder)
    slide = cast("ActiveSlide", Rows())
    log.clear()
    seen = []
    for n in range(3):
        batches.add(slide, torch.full((3, 3, 2, 2), float(n)))
        batches.add(slide, torch.full((1, 3, 2, 2), float(n)))
        assert batches.room == 0
        with batches.taken() as (held, parts):
            log.append("encode")
            seen.append((held.data_ptr(), held.mean().item()))
            assert parts == [(slide, 4)]
        assert batches.room == 4
    assert [value for _, value in seen] == [0, 1, 2]
    assert seen[0][0] == seen[2][0] != seen[1][0]
    each = [
        "t writes",
        "t writes",
        "t records t{n}",
        "e waits for t{n}",
        "encode",
        "e records e{n}",
    ]
    first, second, third = ([text.format(n=n) for text in each] for n in (1, 2, 3))
    assert log == [*first, *second, "t waits for e1", *third]


def test_an_encoder_that_fails_frees_its_buffer() -> None:
    log: list[str] = []
    tiles, encoder = Recording("t", log), Recording("e", log)
    batches = StaticBatches(1, 2, CPU, buffers=1, tiles=tiles, encoder=encoder)
    slide = cast("ActiveSlide", Rows())
    batches.add(slide, torch.zeros(1, 3, 2, 2))
    try:
        with batches.taken():
            raise ValueError
    except ValueError:
        pass
    assert batches.room == 1
    batches.add(slide, torch.zeros(1, 3, 2, 2))
    assert "t waits for e1" in log


def test_streams_of_a_cpu_have_done_all_work() -> None:
    for stream in (own_stream(CPU), current_stream(CPU)):
        with stream.use():
            event = stream.record()
        stream.wait(event)
        event.synchronize()
        assert event.query()
        assert stream.handle == 0
