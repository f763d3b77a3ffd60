"""Metrics per level, on the tree, and their intervals."""

from hmil_fast.metrics.bootstrap import Interval, bootstrap
from hmil_fast.metrics.flat import calibration_error, flat_metrics, reliability_bins
from hmil_fast.metrics.summary import evaluate_predictions
from hmil_fast.metrics.tree import summed, tree_metrics

__all__ = [
    "Interval",
    "bootstrap",
    "calibration_error",
    "evaluate_predictions",
    "flat_metrics",
    "reliability_bins",
    "summed",
    "tree_metrics",
]
