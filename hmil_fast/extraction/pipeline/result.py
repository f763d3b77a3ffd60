"""SlideResult, and the conversion of any exception into an error with a fix."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hmil_fast.errors import HmilError, SlideError
from hmil_fast.extraction.encoders import first_line


@dataclass(frozen=True)
class SlideResult:
    """What became of one slide; `error` is None where its features are in the store.

    Each of `notes` is what the user should know and what to do about it ("" if nothing).
    """

    slide_id: str
    num_tiles: int = 0
    bad_tiles: int = 0
    seconds: float = 0.0
    notes: Sequence[Sequence[str]] = ()
    error: HmilError | None = None


def explained(error: Exception, slide: Path) -> HmilError:
    """Any exception of a slide's extraction as an error with a fix."""
    if isinstance(error, HmilError):
        return error
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return SlideError(
            f"slide {slide}: out of memory ({first_line(error)})",
            "run the same command with a smaller --batch-size",
        )
    if isinstance(error, OSError):
        return SlideError(
            f"slide {slide}: {error}",
            "check the disks of the slide and of the store; then run the same command again",
        )
    return SlideError(
        f"slide {slide}: {first_line(error)}",
        "look at the slide with `hmil-fast doctor`; if it is sound, report this as a bug",
    )
