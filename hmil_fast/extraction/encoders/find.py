"""Find an encoder's card by name: in the table, in installed plugins, or as a timm model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points

import torch
from torch import nn

from hmil_fast.errors import UsageError
from hmil_fast.extraction.encoders.architectures import (
    build_empty,
    build_model,
    first_line,
    timm_package,
)
from hmil_fast.extraction.encoders.cards import CARDS, EncoderCard, encoder_names

PLUGINS = "hmil_fast.encoders"  # group of entry points


@dataclass(frozen=True)
class Found:
    """A card, and its model where a plugin brings one with weights of its own."""

    card: EncoderCard
    model: nn.Module | None = None

    def build(self) -> nn.Module:
        """The model, to be filled with weights unless a plugin brought it."""
        if self.model is not None:
            return self.model
        # of timm's others some compute more than buffers
        return build_empty(self.card) if self.card in CARDS else build_model(self.card)


def find_encoder(name: str) -> Found:
    """The encoder of a name.

    Raises:
        UsageError: Neither a card, nor a plugin, nor a timm model has this name, or the plugin
            that has it is broken.
    """
    for card in CARDS:
        if card.name == name:
            return Found(card)
    for point in _points():
        if point.name == name:
            return _load(point)
    return Found(_timm_card(name))


def find_card(name: str) -> EncoderCard:
    """The card of an encoder; raises as `find_encoder` does."""
    return find_encoder(name).card


def plugins() -> tuple[list[EncoderCard], list[UsageError]]:
    """Cards of all plugins, and what is wrong with those that are broken."""
    cards, broken = [], []
    for point in _points():
        try:
            cards.append(_load(point).card)
        except UsageError as error:
            broken.append(error)
    return cards, broken


def _points() -> list[EntryPoint]:
    return sorted(entry_points(group=PLUGINS), key=lambda point: point.name)


def _load(point: EntryPoint) -> Found:
    """Call a plugin; whatever goes wrong in its code is told with its name."""
    package = point.dist.name if point.dist else "an unnamed distribution"
    plugin = f"encoder plugin {point.name!r} of {package} ({point.value})"
    fix = f"upgrade {package}, or pip uninstall {package}"
    if point.name in encoder_names():
        raise UsageError(f"{plugin} has the name of an encoder of hmil-fast", fix)
    try:
        made = point.load()()
    except Exception as error:  # noqa: BLE001  # foreign code
        raise UsageError(f"{plugin} is broken: {first_line(error)}", fix) from None
    card, model = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(card, EncoderCard) or not (model is None or isinstance(model, nn.Module)):
        raise UsageError(
            f"{plugin} returns {type(made).__name__}, not an EncoderCard or (EncoderCard, module)",
            fix,
        )
    if card.name != point.name:
        raise UsageError(f"{plugin} returns a card named {card.name!r}", fix)
    return Found(card, model)


def _near(name: str, known: Sequence[str]) -> list[str]:
    """Up to two names that are like one, whatever its case, hyphens, underscores and dots."""
    bare = {re.sub(r"[^a-z0-9]", "", each.lower()): each for each in known}
    wanted = re.sub(r"[^a-z0-9]", "", name.lower())
    if wanted in bare:
        return [bare[wanted]]
    return [bare[each] for each in get_close_matches(wanted, bare, n=2, cutoff=0.7)]


def _timm_card(name: str) -> EncoderCard:
    timm = timm_package()
    if not timm.is_model(name):
        known = encoder_names() + [point.name for point in _points()]
        near = _near(name, known) or _near(name, timm.list_models())
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(
            f"no encoder is called {name!r}{meant}",
            f"use one of {', '.join(known)}, or any name of timm.list_models()",
        )
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    data = timm.data.resolve_model_data_config(model)
    return EncoderCard(
        name,
        name,
        int(model.num_features),
        hub=model.pretrained_cfg.get("hf_hub_id"),
        resize_px=int(data["input_size"][-1]),
        input_px=int(data["input_size"][-1]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=str(data["interpolation"]),
    )
