"""HMIL and the baselines."""
