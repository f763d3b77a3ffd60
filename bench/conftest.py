"""Loaded before any benchmark, and so before torch: see _import in io/slide/cucim_reader.py."""

import hmil_fast.io.slide  # noqa: F401
