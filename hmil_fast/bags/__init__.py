"""Bags of features: splits, packed batches, the feature cache."""
