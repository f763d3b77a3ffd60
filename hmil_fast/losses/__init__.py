"""Losses: classification on the tree, hierarchy alignment, supervised contrast, their sum."""

from hmil_fast.losses.total import HmilLoss, LossTerms
from hmil_fast.recipe import PRESETS

__all__ = ["PRESETS", "HmilLoss", "LossTerms"]
