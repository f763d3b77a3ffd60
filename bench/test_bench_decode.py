"""Measure CPU-ms per tile, from the file to the normalised tensor, against OpenSlide + PIL.

The file is real H&E (CMU-1-Small-Region) laid out again as 256-px JPEG tiles, 4:2:0, large enough
that opening does not count. All ways read the same tiles in the same run.
"""

import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import openslide
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torchvision import transforms as v1

from hmil_fast.io.slide import open_slide
from hmil_fast.io.slide.device_decoder import DeviceDecoder
from hmil_fast.io.tiles.decode import decode_tiles
from hmil_fast.io.tiles.grid import TileSpec, plan_grid
from hmil_fast.io.tiles.tissue import TissueMask
from hmil_fast.io.tiles.transform import build_transform

ROOT = Path(__file__).resolve().parent.parent
SLIDE = ROOT / "tests" / "data" / "CMU-1-Small-Region.svs"
SIDE = 8192
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def big_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8192 × 8192 px of tissue from CMU-1-Small-Region, every tile its own JPEG."""
    tifffile = pytest.importorskip("tifffile")
    from PIL import Image

    with openslide.OpenSlide(SLIDE) as slide:
        part = np.asarray(slide.read_region((500, 900), 0, (1024, 2048)))[..., :3]
    whole = np.tile(part, (SIDE // 2048, SIDE // 1024, 1))

    def jpegs() -> "list[bytes]":
        import io

        made = []
        for y in range(0, SIDE, 256):
            for x in range(0, SIDE, 256):
                buffer = io.BytesIO()
                tile = Image.fromarray(whole[y : y + 256, x : x + 256])
                tile.save(buffer, "JPEG", quality=80, subsampling=2)
                made.append(buffer.getvalue())
        return made

    path = tmp_path_factory.mktemp("bench") / "big.tif"
    tifffile.imwrite(
        path,
        iter(jpegs()),
        shape=whole.shape,
        dtype=np.uint8,
        tile=(256, 256),
        compression="jpeg",
        photometric="ycbcr",
        subsampling=(2, 2),
        resolution=(20_000, 20_000),
        resolutionunit="CENTIMETER",
    )
    return path


@dataclass(frozen=True)
class Case:
    """Tiles of `size` px whose grid begins `offset` px inside the slide's own."""

    size: int
    offset: int

    @property
    def corners(self) -> "list[tuple[int, int]]":
        """The last ones reach past the slide."""
        starts = range(self.offset, SIDE, self.size)
        return [(x, y) for y in starts for x in starts]


CASES = {
    "256 px aligned": Case(256, 0),
    "256 px, 100 px off": Case(256, 100),
    "224 px": Case(224, 0),
    "512 px aligned": Case(512, 0),
    "512 px, 100 px off": Case(512, 100),
}
Take = Callable[[torch.Tensor], None]


def ours(
    path: Path,
    case: Case,
    take: Take | None,
    reader: str | None = None,
    to: DeviceDecoder | None = None,
) -> None:
    """Open, check, decode every tile and, for `take`, normalise it."""
    transform = build_transform(
        read_px=case.size,
        input_px=case.size,
        mean=MEAN,
        std=STD,
        interpolation="bilinear",
        batch=case_batch(case),
        device=torch.device("cpu"),
    )
    with open_slide(path, reader=reader) as slide:
        spec = TileSpec(case.size, 0.5, min_tissue=0)
        grid = plan_grid(slide.info, spec, TissueMask(np.ones((8, 8), np.bool_), 512.0, None))
        xy = np.array(case.corners, np.int64)
        grid = replace(grid, xy=xy, coords=xy)
        for tiles in decode_tiles(slide, grid, batch=case_batch(case), threads=1, to=to):
            assert not tiles.status.any()
            if take is not None:
                take(transform(tiles.pixels))
            tiles.release()


class Peer(torch.utils.data.Dataset[torch.Tensor]):
    """OpenSlide, PIL and torchvision, a tile at a time."""

    def __init__(self, path: Path, case: Case, tensors: bool) -> None:
        self.slide, self.case, self.tensors = openslide.OpenSlide(path), case, tensors
        self.corners = case.corners
        self.transform = v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> torch.Tensor:
        size = (self.case.size, self.case.size)
        tile = self.slide.read_region(self.corners[index], 0, size).convert("RGB")
        return self.transform(tile) if self.tensors else torch.zeros(1)


def theirs(path: Path, case: Case, take: Take | None) -> None:
    """The same tiles the way most tools take them; without workers, whose copies cost more."""
    data = Peer(path, case, take is not None)
    for tiles in torch.utils.data.DataLoader(data, batch_size=case_batch(case)):
        if take is not None:
            take(tiles)
    data.slide.close()


def touch(tiles: torch.Tensor) -> None:
    """Keeps the work honest."""
    assert torch.isfinite(tiles[:, :, 0, 0]).all()


def case_batch(case: Case) -> int:
    """64 tiles of 256 px, or as many pixels."""
    return max(1, 64 * 256**2 // case.size**2)


def test_decode_to_normalised_tensors(benchmark: BenchmarkFixture, big_slide: Path) -> None:
    """All cases in turns, so that a busy machine slows all; CPU time of the process."""
    ways: dict[str, Callable[[Path, Case, Take | None], None]] = {
        "ours": ours,
        "on device": partial(ours, to=DeviceDecoder(torch.device("cpu"))),
        "cucim": partial(ours, reader="cucim"),
        "openslide": theirs,
    }
    same(big_slide)
    spent: dict[tuple[str, str, bool], list[float]] = defaultdict(list)

    order = deque(ways.items())

    def once() -> None:
        order.rotate()  # the first one pays for memory that the next ones find
        for (name, case), tensors in product(CASES.items(), (False, True)):
            for way, run in order:
                began = time.process_time()
                run(big_slide, case, touch if tensors else None)
                spent[name, way, tensors].append(time.process_time() - began)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        benchmark.pedantic(once, rounds=3, warmup_rounds=1)
    rows = {key: median(values[1:]) for key, values in spent.items()}
    for name, case in CASES.items():
        tiles = len(case.corners)
        for tensors in (False, True):
            ms = {way: 1000 * rows[name, way, tensors] / tiles for way in ways}
            what = "decode → tensor" if tensors else "decode"
            off = rows[name, "ours", tensors] / rows["256 px aligned", "ours", tensors]
            benchmark.extra_info[f"{name}, {what}"] = {way: round(v, 3) for way, v in ms.items()}
            print(
                f"\n{name:19} {what:15} ms a tile: "
                + ", ".join(f"{way} {value:.3f}" for way, value in ms.items())
                + f"; OpenSlide ÷ ours {ms['openslide'] / ms['ours']:.2f}; per source tile "
                + f"{off:.2f} × aligned",
                end="",
            )


def same(path: Path) -> None:
    """Both ways make the same tensors."""
    case = Case(512, 100)
    made: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    ours(path, case, lambda x: made[True].append(x[:, :, 0].clone()))
    theirs(path, case, lambda x: made[False].append(x[:, :, 0].clone()))
    inside = [x + 512 <= SIDE and y + 512 <= SIDE for x, y in case.corners]
    both = [torch.cat(made[mine])[torch.tensor(inside)] for mine in (True, False)]
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)
