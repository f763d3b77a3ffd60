"""Make what the measurements need: slides, weights and bags, on the CPU."""

import numpy as np
import tifffile
import timm
import torch
from safetensors.torch import save_file

from bench.first_gpu.journal import dry, folder, say
from bench.test_bench_extract import ROOT, make_slide
from hmil_fast.io.store import StoreSpec, create_store

LEAVES = ("N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC")
TREE = "benign: [N, PB, UDH]\natypical: [FEA, ADH]\nmalignant: [DCIS, IC]\n"
J2K = ROOT / "tests" / "data" / "cmu1_jpeg2000.svs"


def slide() -> None:
    """Real H&E repeated: 24,576 tiles of 256 px in JPEG 4:2:0, 0.5 µm/px."""
    columns, rows = (16, 4) if dry() else (192, 128)
    make_slide(folder() / "jpeg.tif", columns, rows)
    say("slide", tiles=columns * rows)


def slide_jpeg2000() -> None:
    """The tiles of a real JPEG 2000 slide, repeated: 8,192 of 256 px, 0.5 µm/px."""
    columns, rows = (8, 8) if dry() else (128, 64)
    tiles = raw_tiles()
    with tifffile.TiffWriter(folder() / "jpeg2000.tif") as file:
        file.write(
            (tiles[n % len(tiles)] for n in range(columns * rows)),
            shape=(rows * 256, columns * 256, 3),
            dtype=np.uint8,
            tile=(256, 256),
            compression=33005,
            photometric="rgb",
            resolution=(20_000, 20_000),
            resolutionunit="CENTIMETER",
        )
    say("slide_jpeg2000", tiles=columns * rows)


def raw_tiles() -> list[bytes]:
    """The bytes of the JPEG 2000 slide's whole tiles."""
    with tifffile.TiffFile(J2K) as file:
        page = file.pages[0]
        assert (page.tilewidth, page.tilelength) == (256, 256)
        found = []
        for start, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            file.filehandle.seek(start)
            found.append(file.filehandle.read(count))
    return found


def weights() -> None:
    """Random weights of a ViT-L/16."""
    name = "vit_tiny_patch16_224" if dry() else "vit_large_patch16_224"
    model = timm.create_model(name, num_classes=0)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder() / "vit.safetensors")
    (folder() / "vit.name").write_text(name)
    say("weights", name=name)


def bags() -> None:
    """Noise of the size of a BRACS cohort: 240 bags, 1.2 M rows of 1,024 in fp16."""
    slides, mean, dim = (20, 60, 64) if dry() else (240, 5000, 1024)
    rng = np.random.default_rng(0)
    block = rng.standard_normal((8192, dim), np.float32).astype(np.float16)
    store = create_store(
        folder() / "bags", StoreSpec(dim, "float16", {"name": "noise"}, {"tile_px": 256})
    )
    spread = rng.lognormal(0, 0.5, slides)
    lengths = np.clip(spread / spread.mean() * mean, 8, 8192).astype(int).tolist()
    rows = ["slide_id,label,patient_id"]
    for k, n in enumerate(lengths):
        with store.writer(f"s{k}", n, {}) as writer:
            writer.append(np.roll(block, 17 * k, 0)[:n])
            writer.commit(np.zeros((n, 2), np.int64), np.zeros(n, np.uint8), {})
        rows.append(f"s{k},{LEAVES[k % 7]},p{k}")
    (folder() / "labels.csv").write_text("\n".join(rows) + "\n")
    (folder() / "tree.yaml").write_text(TREE)
    say("bags", slides=slides, instances=sum(lengths))


def cuda_is_there() -> None:
    """Fail early, and say what the machine is."""
    if not dry() and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --dry tries the script on a CPU")
