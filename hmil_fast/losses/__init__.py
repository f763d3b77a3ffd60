"""Losses: cross-entropy along the tree, hierarchy alignment, supervised contrast, and their sum."""

from hmil_fast.losses.total import PRESETS, HmilLoss, LossTerms

__all__ = ["PRESETS", "HmilLoss", "LossTerms"]
