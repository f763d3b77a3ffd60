"""Losses: classification on the tree, hierarchy alignment, supervised contrast, their sum."""

from hmil_fast.losses.total import HmilLoss, LossTerms
from hmil_fast.presets import PRESETS, LossSettings

__all__ = ["PRESETS", "HmilLoss", "LossSettings", "LossTerms"]
