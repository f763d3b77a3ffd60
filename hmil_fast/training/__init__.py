"""Training, evaluation, heatmaps and the report."""
