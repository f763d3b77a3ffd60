"""Attention, heatmaps and the report."""
