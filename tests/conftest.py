"""Fixtures shared by all tests: where the real slides lie, and the marks' conditions."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does, before torch

import hmil_fast.io.slide.cucim_source  # noqa: F401  # before torch: see _import there

ROOT = Path(__file__).resolve().parent.parent


def find_slide(name: str) -> Path:
    """A real test slide by file name; skips, saying why, where this machine lacks it."""
    here = ROOT / "tests" / "data" / name
    more = Path(os.environ.get("HMIL_TEST_DATA", ROOT.parent / "shared" / "data")) / "slides" / name
    for path in (here, more):
        if path.exists():
            return path
    pytest.skip(f"{name} is not in tests/data and HMIL_TEST_DATA names no folder that has it")


@pytest.fixture(scope="session")
def slide_file() -> Callable[[str], Path]:
    return find_slide


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device on this machine")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
