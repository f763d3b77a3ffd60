"""Metrics per level, on the tree, and their intervals."""
