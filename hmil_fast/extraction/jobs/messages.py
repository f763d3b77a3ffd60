"""Messages that a job sends while it runs: from its workers, and to whoever shows its progress."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hmil_fast.extraction.pipeline.result import SlideResult
from hmil_fast.extraction.slides import SlideTask


@dataclass(frozen=True)
class JobStarted:
    """The slides that the job is to extract, without those that are in the store already."""

    tasks: Sequence[SlideTask]


@dataclass(frozen=True)
class Notice:
    """A line of text for the user.

    Attributes:
        text: The line.
        level: "info", "note", or "bad" for what may keep slides from being extracted.
    """

    text: str
    level: str = "note"


@dataclass(frozen=True)
class Hanging:
    """No tile was finished for so many minutes; sent by a job without workers, from a thread."""

    minutes: float


@dataclass(frozen=True)
class TilesDone:
    """Tiles of a slide that are encoded so far, and tiles in all."""

    slide_id: str
    done: int
    total: int


@dataclass(frozen=True)
class SearchDone:
    """Share of a level of `px` pixels that the search for a slide's tissue has read."""

    slide_id: str
    share: float
    px: int


@dataclass(frozen=True)
class Elsewhere:
    """Another process has stored a slide of this job."""

    slide_id: str


# a worker's messages; a dict holds its seconds by stage, sent when it ends
Message = TilesDone | SearchDone | Elsewhere | SlideResult | dict[str, float]
Event = JobStarted | Notice | Hanging | TilesDone | SearchDone | Elsewhere | SlideResult
Report = Callable[[Event], None]


def no_report(event: Event) -> None:
    """Report nothing."""
