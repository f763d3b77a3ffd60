"""Fixtures shared by all tests: where the real slides lie, and the marks' conditions."""

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does, before torch

import hmil_fast.io.slide.cucim_source  # noqa: F401  # before torch: see _import there

hypothesis.settings.register_profile("any machine", deadline=None)  # however busy
hypothesis.settings.load_profile("any machine")

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


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server on a free port of this machine, and the environment that leads to it."""
    for name in ("moto", "obstore"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed; it comes with the extra `test`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    said = (tmp_path_factory.mktemp("s3") / "log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ALLOW_HTTP", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1")
        until = time.monotonic() + 600
        while True:
            try:
                bucket = HTTPConnection("127.0.0.1", port, timeout=60)
                bucket.request("PUT", "/cohort")
                assert bucket.getresponse().status == 200
                break
            except OSError:
                assert time.monotonic() < until
                assert server.poll() is None
                time.sleep(0.05)
        yield url
    server.kill()
    server.wait()
    said.close()


@pytest.fixture
def s3(s3_server: str) -> str:
    """The URL of a place for one store in a bucket that exists."""
    return f"s3://cohort/of µ/{uuid.uuid4().hex[:8]}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device on this machine")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
