"""Slide files: levels, scale, and the pixels of tiles."""

from hmil_fast.io.slide.opening import open_slide
from hmil_fast.io.slide.protocol import (
    Note,
    Progress,
    SlideInfo,
    SlideReader,
    TileBand,
    TileStatus,
    require_mpp,
)

__all__ = [
    "Note",
    "Progress",
    "SlideInfo",
    "SlideReader",
    "TileBand",
    "TileStatus",
    "open_slide",
    "require_mpp",
]
