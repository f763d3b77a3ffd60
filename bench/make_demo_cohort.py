"""Choose the tiles of the demo cohort and lay them out; writes the files that the package ships.

    python bench/make_demo_cohort.py pcam_subset.zip hmil_fast/demo/data

The zip holds PatchCamelyon tiles as `split/label/name.jpg`, label 1 = tumour in the centre.
Everything is drawn from one seed: the same zip gives the same files. No model has a say in which
tile is taken; two pixel statistics have: a tile must be mostly tissue, and the tiles of a slide are
stained alike (they come from two laboratories, whose slides look different).
"""

import argparse
import csv
import io
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SEED = 20
MIN_TISSUE = 0.5
PINK = 0.3  # share of each class's slides that one of the two laboratories stained
STAIN_CUT = 0.01  # the valley between the two laboratories' hues
STAIN_SPREAD = 0.1  # how mixed the stain of one slide is, in units of hue
TILES_PER_SLIDE = (28, 33)  # numpy's half-open ranges, here and below
# label: slides, tumour tiles a slide
CLASSES = {
    "negative": (22, (0, 1)),
    "isolated_cells": (14, (6, 10)),
    "micro": (14, (14, 19)),
    "macro": (14, (23, 28)),
}
TREE = """\
# What a lymph-node slide is diagnosed as; the leaves of `positive` go by the share of tumour.
negative: [negative]
positive: [isolated_cells, micro, macro]
"""
SHARED_PATIENTS = 0.25  # share of the patients who have two slides
ZIP_TIME = (2020, 1, 1, 0, 0, 0)


@dataclass
class Tile:
    """A tile of the source and what its pixels say."""

    name: str
    tumour: bool
    tissue: float
    hue: float
    darkness: float


@dataclass
class Slide:
    """A slide to be: its label, and its tiles by grid cell."""

    label: str
    stain: str
    tiles: int
    tumour: int
    patient: int = -1
    cells: dict[tuple[int, int], Tile] = field(default_factory=dict)


def measure(name: str, data: bytes) -> Tile:
    """Tissue share, hue (red minus blue share of the tissue's optical density) and darkness."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.float64)
    grey = pixels.mean(axis=2)
    tissue = (np.ptp(pixels, axis=2) > 20) & (grey < 225) & (grey > 40)
    density = -np.log(np.clip(pixels, 1, 245) / 245)[tissue].sum(axis=0)
    hue = (density[0] - density[2]) / max(density.sum(), 1e-9)
    return Tile(name, name.split("/")[1] == "1", tissue.mean(), hue, -float(grey.mean()))


def stain_of(tile: Tile) -> str:
    return "pink" if tile.hue > STAIN_CUT else "purple"


def plan(rng: np.random.Generator) -> list[Slide]:
    """The slides without their tiles; stains are spread alike over the classes."""
    slides = []
    for label, (count, tumour) in CLASSES.items():
        pink = round(count * PINK)
        sizes = rng.integers(*TILES_PER_SLIDE, count)
        shares = rng.integers(*tumour, count)
        for i in range(count):
            stain = "pink" if i < pink else "purple"
            slides.append(Slide(label, stain, int(sizes[i]), int(shares[i])))
    slides = [slides[i] for i in rng.permutation(len(slides))]
    slides.sort(key=lambda slide: slide.stain)
    patient = 0
    for slide, after in zip(slides, [*slides[1:], None], strict=True):
        if slide.patient < 0:
            slide.patient = patient
            # the next slide is stained most alike, as two slides of one patient are
            if after and after.stain == slide.stain and rng.random() < SHARED_PATIENTS:
                after.patient = patient
            patient += 1
    return slides


def deal(slides: list[Slide], pool: list[Tile], rng: np.random.Generator) -> list[list[Tile]]:
    """Draw each slide's tiles at random from its stain; slides in a row get neighbours in hue."""
    dealt: list[list[Tile]] = [[] for _ in slides]
    for stain in ("pink", "purple"):
        for tumour in (False, True):
            here = [tile for tile in pool if tile.tumour == tumour and stain_of(tile) == stain]
            wanted = [
                (i, slide.tumour if tumour else slide.tiles - slide.tumour)
                for i, slide in enumerate(slides)
                if slide.stain == stain
            ]
            total = sum(count for _, count in wanted)
            print(f"{stain}, tumour {tumour}: {total} of {len(here)} tiles")
            assert total <= len(here), "the source has too few tiles of this kind"
            drawn = [here[k] for k in rng.permutation(len(here))[:total]]
            key = [tile.hue + rng.normal(0, STAIN_SPREAD) for tile in drawn]
            order = iter(np.argsort(key, kind="stable"))
            for i, count in wanted:
                dealt[i] += [drawn[next(order)] for _ in range(count)]
    return dealt


def blob(
    count: int, centre: NDArray[np.float64], taken: set[tuple[int, int]], rng: np.random.Generator
) -> list[tuple[int, int]]:
    """A connected shape of `count` cells, grown from the centre as an uneven ellipse."""
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 2.2)
    axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    axes[1] *= stretch
    start = (int(centre[0]), int(centre[1]))
    cells, noise = [start], {}
    frontier: set[tuple[int, int]] = set()
    near = {(x + dx, y + dy) for x, y in taken for dx in (-1, 0, 1) for dy in (-1, 0, 1)}
    while len(cells) < count:
        x, y = cells[-1]
        frontier |= {(x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)} - set(cells) - near
        for cell in sorted(frontier - noise.keys()):
            noise[cell] = np.linalg.norm(axes @ (np.array(cell) - centre)) + rng.uniform(0, 1.2)
        best = min(sorted(frontier), key=lambda cell: noise[cell])
        frontier.remove(best)
        cells.append(best)
    return cells


def lay_out(slide: Slide, tiles: list[Tile], rng: np.random.Generator) -> None:
    """Place the tiles: one or two pieces of tissue, tumour in clusters, pale tiles at the rim."""
    pieces = [slide.tiles]
    if rng.random() < 0.4:
        first = int(slide.tiles * rng.uniform(0.45, 0.7))
        pieces = [first, slide.tiles - first]
    cells: list[tuple[int, int]] = []
    centre = np.array([0.0, 0.0])
    for count in pieces:
        cells += blob(count, centre, set(cells), rng)
        turn = rng.uniform(0, 2 * np.pi)
        # clear of the first piece, whose half is at most some five cells long
        centre = np.round(np.array([np.cos(turn), np.sin(turn)]) * rng.uniform(7, 8.5))
    # a metastasis spreads from one cell; isolated cells lie about
    seed = np.array(cells[rng.integers(len(cells))], dtype=np.float64)
    spread = 6.0 if slide.label == "isolated_cells" else 0.9
    far = [np.linalg.norm(np.array(c) - seed) + rng.uniform(0, spread) for c in cells]
    ranked = [cells[i] for i in np.argsort(far, kind="stable")]
    for tumour, here in ((True, ranked[: slide.tumour]), (False, ranked[slide.tumour :])):
        depth = {c: sum(abs(c[0] - x) + abs(c[1] - y) <= 2 for x, y in cells) for c in here}
        inner = sorted(here, key=lambda c: (-depth[c], c))
        dark = sorted((t for t in tiles if t.tumour == tumour), key=lambda t: -t.darkness)
        slide.cells |= dict(zip(inner, dark, strict=True))
    left, top = (min(c[i] for c in cells) - int(rng.integers(1, 3)) for i in (0, 1))
    slide.cells = {(x - left, y - top): slide.cells[x, y] for x, y in sorted(cells)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="zip of split/label/name.jpg")
    parser.add_argument("out", type=Path, help="folder to write into")
    args = parser.parse_args()
    rng = np.random.default_rng(SEED)
    with zipfile.ZipFile(args.source) as source:
        data = {n: source.read(n) for n in sorted(source.namelist()) if n.endswith(".jpg")}
    pool = [tile for name in data if (tile := measure(name, data[name])).tissue >= MIN_TISSUE]
    slides = plan(rng)
    for slide, tiles in zip(slides, deal(slides, pool, rng), strict=True):
        lay_out(slide, tiles, rng)
    # ids must not give the label or the stain away by their order
    slides = [slides[i] for i in rng.permutation(len(slides))]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tree.yaml").write_text(TREE)
    with (
        (args.out / "labels.csv").open("w", newline="") as labels,
        (args.out / "manifest.csv").open("w", newline="") as manifest,
        zipfile.ZipFile(args.out / "tiles.zip", "w") as archive,
    ):
        label_rows = csv.writer(labels, lineterminator="\n")
        tile_rows = csv.writer(manifest, lineterminator="\n")
        label_rows.writerow(["slide_id", "label", "patient_id"])
        tile_rows.writerow(["slide_id", "col", "row", "tile", "tumour"])
        for i, slide in enumerate(slides):
            slide_id = f"node-{i:02d}"
            label_rows.writerow([slide_id, slide.label, f"patient-{slide.patient:02d}"])
            for (col, row), tile in slide.cells.items():
                tile_rows.writerow([slide_id, col, row, tile.name, int(tile.tumour)])
                archive.writestr(zipfile.ZipInfo(tile.name, ZIP_TIME), data[tile.name])


if __name__ == "__main__":
    main()
