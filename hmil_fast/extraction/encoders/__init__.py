"""Encoders: the table of cards, models with their weights, and how they run."""

from hmil_fast.extraction.encoders.architectures import first_line
from hmil_fast.extraction.encoders.cards import (
    CARDS,
    DEFAULT_ENCODER,
    EncoderCard,
    encoder_names,
)
from hmil_fast.extraction.encoders.encoder import (
    PRECISIONS,
    Encoder,
    EncoderChoice,
    load_encoder,
)
from hmil_fast.extraction.encoders.find import PLUGINS, find_card, plugins

__all__ = [
    "CARDS",
    "DEFAULT_ENCODER",
    "PLUGINS",
    "PRECISIONS",
    "Encoder",
    "EncoderCard",
    "EncoderChoice",
    "encoder_names",
    "find_card",
    "first_line",
    "load_encoder",
    "plugins",
]
