"""Measure `extract` end to end against its encoder alone, and its peak memory.

The slide is real H&E (CMU-1-Small-Region) repeated and laid out as 256-px JPEG tiles. Both rates
are taken in turns in one process on the same tiles, so that a busy machine slows both.
"""

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import openslide
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from hmil_fast.extraction.encoders import Encoder, find_card, load_encoder
from hmil_fast.extraction.pipeline.extractor import Extractor, store_spec
from hmil_fast.extraction.pipeline.feed import Decoded
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.store import create_store
from hmil_fast.io.tiles.decode import decode_tiles
from hmil_fast.io.tiles.grid import TileSpec

ROOT = Path(__file__).resolve().parent.parent
SLIDE = ROOT / "tests" / "data" / "CMU-1-Small-Region.svs"
SPEC = TileSpec(mpp=0.5, min_tissue=0)

# each size needs a process of its own, which looks at itself: ru_maxrss would be the parent's too
CHILD = """
import json, os, sys, threading, time
from hmil_fast.cli.main import main
peak = 0
def look():
    global peak
    while True:
        with open("/proc/self/statm") as file:
            peak = max(peak, int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        time.sleep(0.02)
threading.Thread(target=look, daemon=True).start()
code = main(sys.argv[1:])
print(json.dumps([code, peak / 2**20]))
"""


def make_slide(path: Path, columns: int, rows: int) -> Path:
    """A tiled JPEG TIFF of columns × rows tiles at 0.5 µm/px, with a second level at 2."""
    import tifffile
    from PIL import Image

    def jpeg(pixels: Image.Image) -> bytes:
        buffer = io.BytesIO()
        pixels.save(buffer, "JPEG", quality=80, subsampling=2)
        return buffer.getvalue()

    with openslide.OpenSlide(SLIDE) as slide:
        part = slide.read_region((500, 900), 0, (1024, 1024)).convert("RGB")
    jpegs = [
        jpeg(part.crop((x, y, x + 256, y + 256)))
        for y in range(0, 1024, 256)
        for x in range(0, 1024, 256)
    ]
    small = jpeg(part.reduce(4))
    levels = [
        ((jpegs[y % 4 * 4 + x % 4] for y in range(rows) for x in range(columns)), 256, 20_000),
        ((small for _ in range(-(-rows // 4) * -(-columns // 4))), 64, 5_000),
    ]
    with tifffile.TiffWriter(path) as file:
        for level, (tiles, edge, px_per_cm) in enumerate(levels):
            file.write(
                tiles,
                shape=(rows * edge, columns * edge, 3),
                dtype=np.uint8,
                tile=(256, 256),
                compression="jpeg",
                photometric="ycbcr",
                subsampling=(2, 2),
                resolution=(px_per_cm, px_per_cm),
                resolutionunit="CENTIMETER",
                subfiletype=int(level > 0),
            )
    return path


def test_extract_beside_the_encoder_alone(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """End to end (open, tissue, decode, transform, encode, write, commit) against forwards."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    columns = 128 if device.type == "cuda" else 48
    path = make_slide(tmp_path / "bench.tif", columns, 16)
    encoder = load_encoder("efficientnet-lite0", None, device)
    store = create_store(tmp_path / "store", store_spec(encoder, SPEC, "float16"))
    extractor = Extractor(store, encoder, SPEC, batch=None if device.type == "cuda" else 64)
    inputs = encoder_inputs(path, extractor)
    alone, whole = [], []
    cpu = [0.0, 0.0]

    def once() -> None:
        began, cpu_began = time.perf_counter(), time.process_time()
        for tiles in inputs:
            encoder(tiles).cpu()
        alone.append(time.perf_counter() - began)
        cpu_between = time.process_time()
        task = SlideTask(f"round {len(whole)}", path)
        (result,) = extractor.run([task], lambda task, done, total: None)
        assert result.error is None
        assert result.num_tiles == 16 * columns
        whole.append(time.perf_counter() - began - alone[-1])
        cpu[0] += cpu_between - cpu_began
        cpu[1] += time.process_time() - cpu_between

    benchmark.pedantic(once, rounds=2, warmup_rounds=1)
    tiles, shares = 16 * columns, [a / w for a, w in zip(alone[1:], whole[1:], strict=True)]
    benchmark.extra_info["share_of_encoder_rate"] = [round(share, 3) for share in shares]
    benchmark.extra_info["tiles_per_s"] = round(tiles / min(whole[1:]), 1)
    print(
        f"\n{tiles} tiles, {device}, {torch.get_num_threads()} threads: encoder alone "
        f"{tiles / min(alone[1:]):.1f} tiles/s, extract {tiles / min(whole[1:]):.1f}; "
        f"share {median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f}); "
        f"of CPU time the encoder takes {cpu[0] / cpu[1]:.3f}"
    )


def encoder_inputs(path: Path, extractor: Extractor) -> list[torch.Tensor]:
    """The slide's tiles as the encoder takes them, decoded and transformed beforehand."""
    slide = extractor.open(SlideTask("inputs", path))
    inputs = []
    with slide.reader:
        for tiles in decode_tiles(slide.reader, slide.grids, batch=extractor.batch, threads=2):
            part = slice(0, len(tiles.pixels))
            inputs.append(extractor.transform(Decoded(slide, tiles), part).clone())
            tiles.release()
    slide.abandon()
    return inputs


class NoFeatures(torch.nn.Module):
    """Costs nothing."""

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        return torch.zeros(len(tiles), 1280)


def test_cost_of_a_small_slide(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """All but the encoder: open, tissue, grid, pictures, four tiles, commit; CPU time, one job."""
    slides, path = 100, SLIDE.with_name("cmu1_small_pyramid.tif")
    encoder = Encoder(find_card("efficientnet-lite0"), NoFeatures(), torch.device("cpu"))
    spec = TileSpec(mpp=2.0)
    store = create_store(tmp_path / "store", store_spec(encoder, spec, "float16"))
    extractor = Extractor(store, encoder, spec, batch=64, threads=2)
    cpu = []

    def once() -> None:
        tasks = [SlideTask(f"{len(cpu)}-{number}", path) for number in range(slides)]
        start = time.process_time()
        results = list(extractor.run(tasks, lambda task, done, total: None))
        cpu.append(time.process_time() - start)
        assert [result.num_tiles for result in results] == [4] * slides

    benchmark.pedantic(once, rounds=2, warmup_rounds=1)
    each = [1000 * seconds / slides for seconds in cpu[1:]]
    benchmark.extra_info["cpu_ms_per_slide"] = [round(ms, 1) for ms in each]
    print(f"\n{slides} slides of 4 tiles: {', '.join(f'{ms:.1f}' for ms in each)} CPU-ms each")


def test_peak_memory_of_eight_times_the_tiles(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Both slides are square and larger than the thumbnail, so that only the tiles differ."""
    peaks: dict[int, float] = {}

    def once() -> None:
        for edge in (12, 34):
            slide = make_slide(tmp_path / f"{edge}.tif", edge, edge)
            args = ["extract", slide, "--store", tmp_path / f"{edge}", "--min-tissue", "0"]
            child = subprocess.run(
                [sys.executable, "-c", CHILD, *map(str, args)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            code, peaks[edge**2] = json.loads(child.stdout.splitlines()[-1])
            assert code == 0

    benchmark.pedantic(once, rounds=1)
    (few, small), (many, large) = peaks.items()
    benchmark.extra_info["peak_mib"] = {str(few): round(small), str(many): round(large)}
    print(
        f"\npeak memory: {few} tiles {small:.0f} MiB, {many} tiles {large:.0f} MiB "
        f"({1024 * (large - small) / (many - few):+.1f} KiB a tile)"
    )
