"""Import cuCIM before torch, for all benchmarks: see _import in io/slide/cucim_source.py."""

import hmil_fast.io.slide.cucim_source  # noqa: F401
