"""Metrics per level, on the tree, calibration, conformal answers, intervals and paired tests."""

from hmil_fast.metrics.bootstrap import Interval, bootstrap
from hmil_fast.metrics.calibration import (
    adaptive_calibration_error,
    calibration_error,
    calibration_scores,
    fit_temperature,
    reliability_bins,
    with_temperature,
)
from hmil_fast.metrics.flat import flat_metrics
from hmil_fast.metrics.paired import Paired, holm, paired_comparison
from hmil_fast.metrics.summary import evaluate_predictions, level_name
from hmil_fast.metrics.tree import summed, tree_metrics

__all__ = [
    "Interval",
    "Paired",
    "adaptive_calibration_error",
    "bootstrap",
    "calibration_error",
    "calibration_scores",
    "evaluate_predictions",
    "fit_temperature",
    "flat_metrics",
    "holm",
    "level_name",
    "paired_comparison",
    "reliability_bins",
    "summed",
    "tree_metrics",
    "with_temperature",
]
