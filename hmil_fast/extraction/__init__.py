"""Slides in, features in the store: encoders, planning, the extraction run, the doctor."""

import hmil_fast.io.slide  # noqa: F401  # before torch: see _import in io/slide/cucim_reader.py
