"""Extraction end to end beside its encoder alone, and the memory it takes for more tiles.

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

from hmil_fast.extraction.encoders import Encoder, load_encoder
from hmil_fast.extraction.plan import SlideTask
from hmil_fast.extraction.prepare import prepare_slide
from hmil_fast.extraction.run import Extractor, store_spec
from hmil_fast.io.store import create_store
from hmil_fast.io.tiles.decode import decode_tiles
from hmil_fast.io.tiles.grid import TileSpec

ROOT = Path(__file__).resolve().parent.parent
SLIDE = ROOT / "tests" / "data" / "CMU-1-Small-Region.svs"
SPEC = TileSpec(mpp=0.5, min_tissue=0)

# each size needs a process of its own, which looks at itself: ru_maxrss would be the parent's too
CHILD = """
import json, os, sys, threading, time
from hmil_fast.cli import main
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
    """A tiled JPEG TIFF of columns × rows tiles at 0.5 µm/px."""
    import tifffile
    from PIL import Image

    with openslide.OpenSlide(SLIDE) as slide:
        part = np.asarray(slide.read_region((500, 900), 0, (1024, 1024)))[..., :3]
    jpegs = []
    for y in range(0, 1024, 256):
        for x in range(0, 1024, 256):
            buffer = io.BytesIO()
            Image.fromarray(part[y : y + 256, x : x + 256]).save(
                buffer, "JPEG", quality=80, subsampling=2
            )
            jpegs.append(buffer.getvalue())
    tifffile.imwrite(
        path,
        (jpegs[y % 4 * 4 + x % 4] for y in range(rows) for x in range(columns)),
        shape=(rows * 256, columns * 256, 3),
        dtype=np.uint8,
        tile=(256, 256),
        compression="jpeg",
        photometric="ycbcr",
        subsampling=(2, 2),
        resolution=(20_000, 20_000),
        resolutionunit="CENTIMETER",
    )
    return path


def test_extract_beside_the_encoder_alone(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """End to end (open, tissue, decode, transform, encode, write, commit) against forwards."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    columns = 128 if device.type == "cuda" else 48
    path = make_slide(tmp_path / "bench.tif", columns, 16)
    encoder = load_encoder("efficientnet-lite0", None, device)
    extractor = Extractor(
        create_store(tmp_path / "store", store_spec(encoder, SPEC, "float16")), encoder, SPEC
    )
    inputs = encoder_inputs(path, encoder, extractor)
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


def encoder_inputs(path: Path, encoder: Encoder, extractor: Extractor) -> list[torch.Tensor]:
    """The slide's tiles as the encoder takes them, decoded and transformed beforehand."""
    ready = prepare_slide(SlideTask("inputs", path), SPEC)
    with ready.reader:
        transform = extractor._transform(ready.grid.read_px)
        inputs = []
        for batch in decode_tiles(ready.reader, ready.grid, batch=extractor.batch, threads=2):
            inputs.append(transform(batch.pixels).clone())
            batch.release()
    return inputs


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
