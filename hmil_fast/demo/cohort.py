"""Assemble the demo's slides from labelled H&E tiles in the package."""

import csv
import io
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from hmil_fast.errors import UsageError

TILE = 96
"""Side of a tile in pixels, of the source's pictures and of every level of the slides."""
MPP = 0.972
"""µm per level-0 pixel (10×)."""

_DATA = Path(__file__).parent / "data"
_GLASS = (242, 241, 243)


class PlacedTile(NamedTuple):
    """One tile of tissue on one slide.

    Attributes:
        col: Column on the slide's grid of `TILE`-pixel cells, 0 at the left.
        row: Row, 0 at the top.
        name: Member of the shipped archive.
        tumour: Whether the source calls it tumour.
    """

    col: int
    row: int
    name: str
    tumour: bool


def read_manifest() -> dict[str, list[PlacedTile]]:
    """Which tile lies where, per slide id."""
    slides: dict[str, list[PlacedTile]] = {}
    with (_DATA / "manifest.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            tile = PlacedTile(int(row["col"]), int(row["row"]), row["tile"], row["tumour"] == "1")
            slides.setdefault(row["slide_id"], []).append(tile)
    return slides


def write_cohort(out: Path) -> Path:
    """Write the demo cohort: real H&E tiles laid out as slides, their labels and their label tree.

    Level 0 of a slide carries the source's own JPEG bytes, so its pixels are exactly the source's.
    The same package writes the same bytes. A slide that is there already is kept: each appears
    whole or not at all, so an interrupted call is simply made again.

    Args:
        out: Folder to write `slides/<slide_id>.tif`, `labels.csv` and `tree.yaml` into.

    Returns:
        `out`.

    Raises:
        UsageError: The folder cannot be written.
    """
    try:
        (out / "slides").mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".part-", dir=out) as folder,
            zipfile.ZipFile(_DATA / "tiles.zip") as archive,
        ):
            part = Path(folder) / "part"
            for slide_id, tiles in read_manifest().items():
                slide = out / "slides" / f"{slide_id}.tif"
                if not slide.exists():
                    part.write_bytes(_slide(tiles, archive))
                    part.replace(slide)
            for name in ("labels.csv", "tree.yaml"):
                shutil.copyfile(_DATA / name, part)
                part.replace(out / name)
    except OSError as error:
        raise UsageError(
            f"cannot write the demo cohort to {out}: {error}", "name a folder you can write to"
        ) from None
    return out


def _slide(tiles: Sequence[PlacedTile], archive: zipfile.ZipFile) -> bytes:
    """A pyramidal TIFF of the tiles, with glass around them."""
    cols = max(tile.col for tile in tiles) + 2
    rows = max(tile.row for tile in tiles) + 2
    picture = Image.new("RGB", (cols * TILE, rows * TILE), _GLASS)
    blank = _jpeg(Image.new("RGB", (TILE, TILE), _GLASS))
    grid = [blank] * (cols * rows)
    for tile in tiles:
        data = archive.read(tile.name)
        grid[tile.row * cols + tile.col] = data
        with Image.open(io.BytesIO(data)) as pixels:
            picture.paste(pixels, (tile.col * TILE, tile.row * TILE))
    levels = [(1, picture.size, grid)]
    for downsample in (2, 4):
        level = picture.reduce(downsample)
        levels.append((downsample, level.size, [_jpeg(tile) for tile in _cut(level)]))
    return _tiff(levels)


def _cut(level: Image.Image) -> Iterator[Image.Image]:
    for y in range(0, level.height, TILE):
        for x in range(0, level.width, TILE):
            tile = Image.new("RGB", (TILE, TILE), _GLASS)
            tile.paste(level.crop((x, y, min(x + TILE, level.width), min(y + TILE, level.height))))
            yield tile


def _jpeg(tile: Image.Image) -> bytes:
    data = io.BytesIO()
    tile.save(data, "JPEG", quality=90, subsampling="4:2:0")  # as the source's are sampled
    return data.getvalue()


def _tiff(levels: Sequence[tuple[int, tuple[int, int], Sequence[bytes]]]) -> bytes:
    """A tiled JPEG TIFF of (downsample, (width, height), tiles row by row) per level.

    Written by hand because tifffile wants imagecodecs even for tiles that are JPEG already.
    """
    file = bytearray(struct.pack("<2sHI", b"II", 42, 0))
    link = 4  # where the offset of the next directory goes

    def store(data: bytes) -> int:
        place = len(file)
        file.extend(data + b"\0" * (len(data) % 2))
        return place

    for downsample, (width, height), tiles in levels:
        resolution = struct.pack("<2I", 10_000_000, round(MPP * 1000 * downsample))  # px per cm
        tags: list[tuple[int, str, list[int]]] = [
            (254, "I", [int(downsample > 1)]),  # a reduced image
            (256, "I", [width]),
            (257, "I", [height]),
            (258, "H", [8, 8, 8]),
            (259, "H", [7]),  # JPEG, each tile a whole picture with its own tables
            (262, "H", [6]),  # YCbCr
            (277, "H", [3]),
            (282, "R", [store(resolution)]),
            (283, "R", [store(resolution)]),
            (284, "H", [1]),
            (296, "H", [3]),  # resolution unit: cm
            (322, "I", [TILE]),
            (323, "I", [TILE]),
            (324, "I", [store(tile) for tile in tiles]),
            (325, "I", [len(tile) for tile in tiles]),
            (530, "H", [2, 2]),  # chroma at half the resolution
        ]
        entries = [_entry(*tag, store) for tag in tags]
        directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
        struct.pack_into("<I", file, link, place := store(directory))
        link = place + len(directory) - 4
    return bytes(file)


def _entry(tag: int, kind: str, values: list[int], store: Callable[[bytes], int]) -> bytes:
    code = {"H": 3, "I": 4, "R": 5}[kind]
    if kind == "R":  # already stored: a rational never fits the entry
        return struct.pack("<HHII", tag, code, 1, values[0])
    data = struct.pack(f"<{len(values)}{kind}", *values)
    inline = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", store(data))
    return struct.pack("<HHI4s", tag, code, len(values), inline)
