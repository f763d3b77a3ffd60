"""Slides in, features in the store: encoders, planning, the extraction run, the doctor."""
