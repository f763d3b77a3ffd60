"""Draw attention: heatmaps of a slide, and the report of a run."""
