"""Fixtures of all tests: real slides, small stores with a planted signal, the command line."""

import csv
import functools
import io
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does, before torch

import hmil_fast.io.slide.cucim_source  # noqa: F401  # before torch: see _import there
from hmil_fast.io.store import FeatureStore, StoreSpec, create_store, open_store

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
    """Skip what asks for cuCIM by name, or for a GPU, where there is none."""
    if find_spec("cucim") is None:
        skip = pytest.mark.skip(reason="cuCIM is not installed")
        for item in items:
            call = getattr(item, "callspec", None)
            if call is not None and "cucim" in call.params.values():
                item.add_marker(skip)
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device on this machine")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


DIM = 16
LEAVES = ("N", "PB", "DCIS", "IC")
TREE = "benign: [N, PB]\nmalignant: [DCIS, IC]\n"
SPEC = StoreSpec(
    DIM, "float16", {"name": "planted", "weights_sha256": "0" * 64}, {"tile_px": 64, "mpp": 0.5}
)
# enough work that a signal finds it running, little enough to wait for
SETTINGS = (
    "folds=3",
    "epochs=40",
    "patience=15",
    "lr=3e-3",
    "batch_bags=8",
    "hidden=24",
    "dropout=0.25",
    "precision=fp32",  # for values that tests work out themselves
    "device=cpu",
)


def fill_store(
    store: FeatureStore, slides: Mapping[str, tuple[int, int]], bad: Sequence[str] = ()
) -> None:
    """Gaussian tiles; a third of a slide's tiles point along the axis of its leaf.

    Args:
        store: Where to.
        slides: Leaf and number of tiles by slide id.
        bad: Slides whose every third tile cannot be decoded.
    """
    for i, (slide_id, (leaf, n)) in enumerate(slides.items()):
        rng = np.random.default_rng([leaf, n, i])
        x = rng.normal(size=(n, store.spec.dim)).astype(np.float32)
        x[: (n + 2) // 3, leaf] += 4
        status = np.zeros(n, np.uint8)
        if slide_id in bad:
            status[::3] = 3
            x[::3] = 0
        columns = 8
        rows = max(1, -(-n // columns))
        coords = np.stack([np.arange(n) % columns, np.arange(n) // columns], 1) * 64
        attrs = {
            "tile_px_level0": 64.0,
            "level0_size": [columns * 64, rows * 64],
            "mpp": {"level0": 0.5},
        }
        jpeg = io.BytesIO()
        Image.new("RGB", (columns * 16, rows * 16), (230, 200, 220)).save(jpeg, "JPEG")
        with store.writer(slide_id, n, attrs) as writer:
            writer.append(x.astype(store.spec.stored_dtype))
            writer.commit(coords, status, {"thumbnail.jpg": jpeg.getvalue()})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads wait for one another on tiny bags, half a second a step on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Cohort:
    """A store with its labels and its tree; `arguments` are those of `hmil-fast train`."""

    path: Path
    slides: dict[str, tuple[int, int]]

    @property
    def store(self) -> FeatureStore:
        return open_store(self.path / "store")

    @property
    def arguments(self) -> list[str]:
        names = {"store": "store", "labels": "labels.csv", "tree": "tree.yaml"}
        return [a for k, v in names.items() for a in (f"--{k}", str(self.path / v))]


def write_labels(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """36 slides of 30 patients; one without tiles, one with bad tiles."""
    path = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    slides = {f"s{i:02d}": (i % 4, int(rng.integers(20, 60))) for i in range(36)}
    slides["s05"] = (1, 0)
    fill_store(create_store(path / "store", SPEC), slides, bad=["s06"])
    rows = [[s, LEAVES[leaf], f"P{i % 30}"] for i, (s, (leaf, _)) in enumerate(slides.items())]
    write_labels(path / "labels.csv", [["slide_id", "label", "patient_id"], *rows])
    (path / "tree.yaml").write_text(TREE)
    return Cohort(path, slides)


Finished = subprocess.CompletedProcess[str]


def child_environment() -> dict[str, str]:
    # one thread: torch's sums over several are not bitwise the same from run to run
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    return child_environment()


@pytest.fixture(scope="session")
def hmil(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """The command line in a child process, from a folder outside the checkout."""
    cwd = tmp_path_factory.mktemp("cwd")

    def run(*arguments: Any) -> Finished:
        return subprocess.run(
            [sys.executable, "-m", "hmil_fast.cli", *map(str, arguments)],
            cwd=cwd,
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run


@pytest.fixture
def start_python(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start Python with these arguments and leave it running."""

    def popen(*arguments: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return popen


@pytest.fixture
def start(
    start_python: Callable[..., subprocess.Popen[str]],
) -> Callable[..., subprocess.Popen[str]]:
    """Start the command line and leave it running."""
    return functools.partial(start_python, "-m", "hmil_fast.cli")


@pytest.fixture(scope="session")
def settings() -> tuple[str, ...]:
    return SETTINGS


@dataclass(frozen=True)
class FinishedRun:
    """A run folder that the command line made, and what it printed."""

    path: Path
    printed: Finished


@pytest.fixture(scope="session")
def run(
    cohort: Cohort, hmil: Callable[..., Finished], tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """A finished run on the cohort; do not change it."""
    path = tmp_path_factory.mktemp("runs") / "run"
    return FinishedRun(path, hmil("train", *cohort.arguments, "--out", path, *SETTINGS))


@pytest.fixture
def train_small(cohort: Cohort) -> Callable[..., Any]:
    """Train on the cohort in this process, one model without a baseline."""
    from hmil_fast.api.train import train as train_run
    from hmil_fast.bags.splits import read_labels
    from hmil_fast.config import load_config, load_runtime
    from hmil_fast.labels import LabelTree

    def train(out: Path, labels: Path | None = None, **changes: Any) -> Any:
        tree = LabelTree.from_yaml(cohort.path / "tree.yaml")
        slides = read_labels(labels or cohort.path / "labels.csv", tree)
        words = [*SETTINGS, "baseline=none", *(f"{k}={v}" for k, v in changes.items())]
        config, runtime = load_config(None, words), load_runtime(None, words)
        return train_run(cohort.store, slides, tree, out, config, runtime=runtime)

    return train


@pytest.fixture(scope="session")
def fill() -> Callable[..., None]:
    return fill_store


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """`cli.main` takes Ctrl-C and SIGTERM for itself."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
