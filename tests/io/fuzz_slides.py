"""Damage the tags and bytes of small slides by seed, and read each as `doctor` and `extract` do.

`python tests/io/fuzz_slides.py FOLDER SEED COUNT` prints a line of JSON for every mutant that did
not end well: read, or refused in words for a person. A crash ends the process; FOLDER then holds
the mutant that did it.
"""

import json
import struct
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tifffile

from hmil_fast.errors import HmilError
from hmil_fast.extraction.prepare import prepare_slide
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.tiles.decode import decode_tiles
from hmil_fast.io.tiles.grid import TileSpec

SLIDE = Path(__file__).resolve().parent.parent / "data" / "CMU-1-Small-Region.svs"
SPEC = TileSpec(tile_px=64, mpp=0.5, min_tissue=0)
APERIO = "Aperio Image Library v12.0.15\r\n256x320 (64x64) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
FORM = {"tile": (64, 64), "photometric": "rgb"}
MPP = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
NUMBERS = (0, 1, 2, 3, 7, 8, 255, 256, 65_535, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
WORDS = (b"Error", b"Exception", b"Traceback", b"report this")


def write_bases(folder: Path) -> list[Path]:
    """Small slides of several kinds: codecs, vendors, byte orders."""
    with openslide.OpenSlide(SLIDE) as slide:
        pixels = np.asarray(slide.read_region((500, 700), 0, (256, 320)).convert("RGB"))
    half = pixels[::2, ::2]
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "jpeg.tif": ({}, {"compression": "jpeg", **MPP}),
        "aperio.svs": ({}, {"compression": "jpeg", "description": APERIO}),
        "lzw.tif": ({}, {"compression": "lzw", "predictor": True, **MPP}),
        "raw.tif": ({"bigtiff": True}, MPP),
        "big.tif": ({"bigtiff": True, "byteorder": ">"}, {"compression": "jpeg", **MPP}),
        "jp2.tif": ({}, {"compression": 33_005, **MPP}),
    }
    for name, (file, page) in kinds.items():
        with tifffile.TiffWriter(folder / name, **file) as tiff:
            tiff.write(pixels, metadata=None, **FORM, **page)
            tiff.write(half, metadata=None, subfiletype=1, **FORM, **page)
    size = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}
    with tifffile.TiffWriter(folder / "a.ome.tif", ome=True) as tiff:
        tiff.write(pixels, subifds=1, metadata=size, compression="jpeg", **FORM)
        tiff.write(half, subfiletype=1, compression="jpeg", **FORM)
    return sorted(folder.iterdir())


def tags_of(path: Path) -> list[tuple[int, int, int]]:
    """(place of the entry, place of the value, bytes of the value) of every tag."""
    found = []
    with tifffile.TiffFile(path) as tiff:
        for page in tiff.pages:
            for each in [page, *(page.pages or ())]:
                found += [(tag.offset, tag.valueoffset, tag.valuebytecount) for tag in each.tags]
    return found


def mutate(raw: bytearray, tags: list[tuple[int, int, int]], rng: np.random.Generator) -> None:
    """Change a few tags, or bytes of their values, or any bytes, or cut the file."""
    big, order = 43 in raw[2:4], "<" if raw[:1] == b"I" else ">"
    wide = "Q" if big else "I"
    for _ in range(rng.integers(1, 4)):
        entry, value, size = tags[rng.integers(len(tags))]
        number = int(rng.choice(NUMBERS)) if rng.random() < 0.7 else int(rng.integers(len(raw)))
        kind = rng.integers(8)
        if kind == 0:
            struct.pack_into(order + "H", raw, entry, int(rng.choice((330, 256, 322, 324, 65_000))))
        elif kind == 1:
            struct.pack_into(order + "H", raw, entry + 2, int(rng.integers(20)))
        elif kind == 2:
            struct.pack_into(order + wide, raw, entry + 4, number)
        elif kind == 3:
            struct.pack_into(order + wide, raw, entry + (12 if big else 8), number)
        elif kind == 4 and size >= 4:
            at = value + 4 * int(rng.integers(size // 4))
            struct.pack_into(order + "I", raw, at, number)
        elif kind == 5 and size:
            raw[value + int(rng.integers(size))] = int(rng.integers(256))
        elif kind == 6:
            raw[int(rng.integers(len(raw)))] = int(rng.integers(256))
        elif kind == 7 and rng.random() < 0.2:
            del raw[int(rng.integers(8, len(raw))) :]
            return


def read(path: Path) -> None:
    """Open, find tissue, lay the grid, decode: all that a job does with a file."""
    ready = prepare_slide(SlideTask("mutant", path, fallback_mpp=0.5), SPEC)
    with ready.reader:
        for batch in decode_tiles(ready.reader, ready.grid, batch=64, threads=1):
            batch.release()


def main(folder: Path, seed: int, count: int) -> None:
    """Read mutants and print those that did not end well."""
    bases = folder / "bases"
    bases.mkdir()
    originals = [(path, path.read_bytes(), tags_of(path)) for path in write_bases(bases)]
    for path, _, _ in originals:
        read(path)
    for n in range(seed, seed + count):
        rng = np.random.default_rng(n)
        path, original, tags = originals[n % len(originals)]
        raw = bytearray(original)
        mutate(raw, tags, rng)
        mutant = folder / f"mutant-{n}{'.ome' if '.ome' in path.name else ''}{path.suffix}"
        mutant.write_bytes(raw)
        problem = None
        try:
            read(mutant)
        except HmilError as error:
            said = f"{error.what} {error.fix}"
            if any(word.decode() in said for word in WORDS) or "\n" in said:
                problem = said
        except Exception:  # noqa: BLE001  # what is looked for
            problem = traceback.format_exc()
        if problem is None:
            mutant.unlink()
        else:
            print(json.dumps({"mutant": mutant.name, "problem": problem}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
