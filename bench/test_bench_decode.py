"""CPU-ms per tile: our whole decode path against OpenSlide, on the same file in the same run.

The file is real H&E (CMU-1-Small-Region) laid out again as 256-px JPEG tiles, 4:2:0, large enough
that opening does not count. Every tile is validated and decoded once.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hmil_fast.io.slide import open_slide
from hmil_fast.io.tiles.decode import decode_tiles
from hmil_fast.io.tiles.grid import TileSpec, plan_grid
from hmil_fast.io.tiles.tissue import TissueMask

ROOT = Path(__file__).resolve().parent.parent
SLIDE = ROOT / "tests" / "data" / "CMU-1-Small-Region.svs"
TILES = 32 * 32


@pytest.fixture(scope="module")
def big_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8192 × 8192 px of tissue from CMU-1-Small-Region, every tile its own JPEG."""
    tifffile = pytest.importorskip("tifffile")
    from PIL import Image

    with openslide.OpenSlide(SLIDE) as slide:
        part = np.asarray(slide.read_region((500, 900), 0, (1024, 2048)))[..., :3]
    whole = np.tile(part, (4, 8, 1))

    def jpegs() -> "list[bytes]":
        import io

        made = []
        for y in range(0, 8192, 256):
            for x in range(0, 8192, 256):
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


def ours(path: Path, offset: int = 0) -> int:
    """Open, validate and decode every tile; the sum of one corner keeps the work honest."""
    total = 0
    with open_slide(path) as slide:
        grid = plan_grid(
            slide.info, TileSpec(min_tissue=0), TissueMask(np.ones((8, 8), np.bool_), 512.0, None)
        )
        object.__setattr__(grid, "xy", grid.xy + offset)
        for tiles in decode_tiles(slide, grid, batch=128, threads=1):
            assert not tiles.status.any()
            total += int(tiles.pixels[:, 0, 0].sum())
            tiles.release()
    return total


def theirs(path: Path, offset: int = 0) -> int:
    """The same tiles by OpenSlide's read_region, as RGB arrays."""
    total = 0
    with openslide.OpenSlide(path) as slide:
        for y in range(0, 8192, 256):
            for x in range(0, 8192, 256):
                tile = slide.read_region((x + offset, y + offset), 0, (256, 256)).convert("RGB")
                total += int(np.asarray(tile)[0, 0].sum())
    return total


@pytest.mark.parametrize("offset", [0, 100], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("reader", [ours, theirs], ids=["hmil-fast", "openslide"])
def test_decode_256_px_jpeg_tiles(
    benchmark: BenchmarkFixture, big_slide: Path, reader: Callable[[Path, int], int], offset: int
) -> None:
    if not offset:
        assert ours(big_slide) == theirs(big_slide)
    cpu: list[float] = []

    def once() -> None:
        began = time.process_time()
        reader(big_slide, offset)
        cpu.append(time.process_time() - began)

    benchmark.pedantic(once, rounds=3, warmup_rounds=1)
    benchmark.extra_info["cpu_ms_per_tile"] = round(1000 * min(cpu) / TILES, 4)
    print(f"\n{reader.__name__} offset {offset}: {1000 * min(cpu) / TILES:.3f} CPU-ms per tile")
