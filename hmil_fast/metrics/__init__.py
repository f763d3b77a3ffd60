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
from hmil_fast.metrics.decision import (
    TreePath,
    all_levels,
    balanced_prior,
    decide,
    leaf_probabilities,
    likelier_elsewhere,
    training_shares,
    with_prior,
)
from hmil_fast.metrics.flat import flat_metrics
from hmil_fast.metrics.paired import Paired, holm, paired_comparison
from hmil_fast.metrics.summary import evaluate_predictions
from hmil_fast.metrics.text import cell_text, level_name, metric_name, number_text, rates
from hmil_fast.metrics.tree import tree_metrics

__all__ = [
    "Interval",
    "Paired",
    "TreePath",
    "adaptive_calibration_error",
    "all_levels",
    "balanced_prior",
    "bootstrap",
    "calibration_error",
    "calibration_scores",
    "cell_text",
    "decide",
    "evaluate_predictions",
    "fit_temperature",
    "flat_metrics",
    "holm",
    "leaf_probabilities",
    "level_name",
    "likelier_elsewhere",
    "metric_name",
    "number_text",
    "paired_comparison",
    "rates",
    "reliability_bins",
    "training_shares",
    "tree_metrics",
    "with_prior",
    "with_temperature",
]
