"""Predictions of a trained run, and what is measured and made from them."""
