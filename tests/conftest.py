"""Fixtures shared by all tests: where the real slides lie, and the marks' conditions."""

import io
import os
import socket
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does, before torch

import hmil_fast.io.slide.cucim_source  # noqa: F401  # before torch: see _import there

hypothesis.settings.register_profile("any machine", deadline=None)  # however busy
hypothesis.settings.load_profile("any machine")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def slide_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A slide by its file name: one of tests/data, or mosaic.tif, made when it is first wanted."""
    made = tmp_path_factory.mktemp("made") / "mosaic.tif"

    def find(name: str) -> Path:
        if name.startswith("mosaic"):
            if not made.exists():
                write_mosaic(made)
            return made.with_name(name)
        return ROOT / "tests" / "data" / name

    return find


def write_mosaic(path: Path) -> None:
    """A pyramid of four levels, each exactly half of the one before, and its regions as .csv.

    72 regions of 480 px, each of 25 real H&E tiles of the demo, lie on grey with noise; 0.5 µm/px.
    """
    import tifffile

    rng = np.random.default_rng(0)
    picture = np.repeat(rng.integers(240, 247, (5080, 6200, 1), np.uint8), 3, axis=2)
    with zipfile.ZipFile(ROOT / "hmil_fast" / "demo" / "data" / "tiles.zip") as archive:
        tiles = [np.asarray(Image.open(io.BytesIO(archive.read(n)))) for n in archive.namelist()]
    lines = ["x,y,w,h"]
    for row, column in np.ndindex(8, 9):
        y, x = 635 * row + rng.integers(20, 130), 300 + 640 * column + rng.integers(130)
        for k, tile in enumerate(rng.choice(len(tiles), 25)):
            top, left = y + k // 5 * 96, x + k % 5 * 96
            picture[top : top + 96, left : left + 96] = tiles[tile]
        lines.append(f"{x},{y},480,480")
    with tifffile.TiffWriter(path) as file:
        for level in range(4):
            file.write(
                np.asarray(Image.fromarray(picture).reduce(2**level)),
                tile=(256, 256), compression="jpeg", compressionargs={"level": 88},
                photometric="rgb", resolutionunit="centimeter",
                resolution=(20_000 / 2**level,) * 2, subfiletype=int(level > 0),
            )  # fmt: skip
    path.with_suffix(".csv").write_text("\n".join(lines))


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
