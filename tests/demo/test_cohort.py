"""The demo cohort: what is shipped, what is written, and that both are what the manifest says."""

import csv
import importlib.util
import io
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import openslide
import pytest
from numpy.typing import NDArray
from PIL import Image

from hmil_fast.demo import cohort
from hmil_fast.demo.cohort import MPP, TILE, read_manifest, write_cohort
from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree

DATA = Path(cohort.__file__).parent / "data"
TUMOUR_TILES = {"negative": (0, 0), "isolated_cells": (6, 9), "micro": (14, 18), "macro": (23, 27)}


def labels() -> list[dict[str, str]]:
    with (DATA / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def source_tile(archive: zipfile.ZipFile, name: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(archive.read(name))))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort") / "new")


def test_the_data_are_small_and_say_where_they_come_from() -> None:
    assert sum(file.stat().st_size for file in DATA.iterdir()) <= 10_000_000
    assert "CC0" in (DATA / "README.md").read_text()


def test_every_tile_of_the_archive_lies_in_one_place() -> None:
    placed = Counter(tile.name for tiles in read_manifest().values() for tile in tiles)
    with zipfile.ZipFile(DATA / "tiles.zip") as archive:
        assert sorted(placed) == sorted(archive.namelist())
        pictures = Counter(archive.read(name) for name in archive.namelist())
    assert set(placed.values()) == {1}
    assert set(pictures.values()) == {1}
    for slide_id, tiles in read_manifest().items():
        cells = {(tile.col, tile.row) for tile in tiles}
        assert len(cells) == len(tiles), slide_id
        assert min(min(cell) for cell in cells) >= 1, f"{slide_id} has no glass at its edge"


def test_labels_follow_the_tumour_tiles() -> None:
    slides = read_manifest()
    tree = LabelTree.from_yaml(DATA / "tree.yaml")
    assert tree.names == (("negative", "positive"), tuple(TUMOUR_TILES))
    assert [row["slide_id"] for row in labels()] == list(slides)
    for row in labels():
        tiles = slides[row["slide_id"]]
        assert all(tile.tumour == (tile.name.split("/")[1] == "1") for tile in tiles)
        low, high = TUMOUR_TILES[row["label"]]
        assert low <= sum(tile.tumour for tile in tiles) <= high, row
        assert 28 <= len(tiles) <= 32


def test_five_folds_by_patient_can_hold_every_class() -> None:
    rows = labels()
    patients = defaultdict(set)
    for row in rows:
        patients[row["label"]].add(row["patient_id"])
    assert len(rows) >= 60
    assert min(Counter(row["label"] for row in rows).values()) >= 10
    assert min(len(some) for some in patients.values()) >= 10
    assert sorted(set(Counter(row["patient_id"] for row in rows).values())) == [1, 2]


def test_one_patch_of_tissue_is_connected() -> None:
    for slide_id, tiles in read_manifest().items():
        left = {(tile.col, tile.row) for tile in tiles}
        pieces = 0
        while left:
            pieces += 1
            edge = [left.pop()]
            while edge:
                x, y = edge.pop()
                near = left & {(x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)}
                left -= near
                edge += near
        assert pieces <= 2, slide_id


@pytest.mark.slow
def test_level_0_shows_the_source_tiles_and_glass_in_openslide(written: Path) -> None:
    with zipfile.ZipFile(DATA / "tiles.zip") as archive:
        for slide_id, tiles in read_manifest().items():
            with openslide.OpenSlide(written / "slides" / f"{slide_id}.tif") as slide:
                check_shape(slide, tiles)
                pixels = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[:, :, :3]
            glass = np.ones(pixels.shape[:2], dtype=bool)
            for tile in tiles:
                cell = np.s_[tile.row * TILE :, tile.col * TILE :]
                np.testing.assert_array_equal(
                    pixels[cell][:TILE, :TILE], source_tile(archive, tile.name), strict=True
                )
                glass[cell][:TILE, :TILE] = False
            assert np.ptp(pixels[glass], axis=0).max() == 0
            assert pixels[glass].min() > 230


def check_shape(slide: openslide.OpenSlide, tiles: list[cohort.PlacedTile]) -> None:
    cols, rows = max(tile.col for tile in tiles) + 2, max(tile.row for tile in tiles) + 2
    assert slide.level_dimensions == tuple((cols * TILE // d, rows * TILE // d) for d in (1, 2, 4))
    assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(MPP, rel=1e-9)
    assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(MPP, rel=1e-9)


def test_lower_levels_are_box_filtered(written: Path) -> None:
    with openslide.OpenSlide(written / "slides" / "node-00.tif") as slide:
        levels = [
            np.asarray(slide.read_region((0, 0), l, slide.level_dimensions[l]))[:, :, :3]
            for l in range(3)
        ]
    for level, d in ((levels[1], 2), (levels[2], 4)):
        height, width = level.shape[:2]
        mean = levels[0].reshape(height, d, width, d, 3).mean(axis=(1, 3))
        error = np.abs(level - mean)
        assert error.mean() < 3  # JPEG
        shifted = np.abs(level - np.roll(mean, 1, axis=1))
        assert error.mean() < shifted.mean() / 2


@pytest.mark.skipif(importlib.util.find_spec("cucim") is None, reason="cuCIM is not installed")
def test_cucim_sees_what_openslide_sees(written: Path) -> None:
    from cucim import CuImage

    for slide_id in list(read_manifest())[:6]:
        path = written / "slides" / f"{slide_id}.tif"
        image = CuImage(str(path))
        assert image.spacing()[:2] == pytest.approx([MPP, MPP], rel=1e-6)
        with openslide.OpenSlide(path) as slide:
            sizes = slide.level_dimensions
            assert image.resolutions["level_dimensions"] == sizes
            for l, size in enumerate(sizes):
                ours = np.asarray(image.read_region((0, 0), size, l))
                theirs = np.asarray(slide.read_region((0, 0), l, size))[:, :, :3]
                np.testing.assert_array_equal(ours, theirs)


def test_two_writes_are_the_same_bytes(written: Path, tmp_path: Path) -> None:
    again = write_cohort(tmp_path)
    files = {path.relative_to(written) for path in written.rglob("*")}
    assert files == {path.relative_to(again) for path in again.rglob("*")}
    assert len(files) == 1 + 2 + len(read_manifest())
    for file in files:
        if (written / file).is_file():
            assert (written / file).read_bytes() == (again / file).read_bytes(), file


def test_a_second_call_keeps_what_is_there_and_makes_what_is_missing(tmp_path: Path) -> None:
    write_cohort(tmp_path)
    kept, lost = tmp_path / "slides" / "node-00.tif", tmp_path / "slides" / "node-01.tif"
    before, data = kept.stat(), lost.read_bytes()
    lost.unlink()
    write_cohort(tmp_path)
    after = kept.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert lost.read_bytes() == data


def test_a_write_cut_short_leaves_whole_slides_only(
    tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = cohort._slide, 0

    def fails_on_the_third(tiles: list[cohort.PlacedTile], archive: zipfile.ZipFile) -> bytes:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(tiles, archive)

    monkeypatch.setattr(cohort, "_slide", fails_on_the_third)
    with pytest.raises(KeyboardInterrupt):
        write_cohort(tmp_path)
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["node-00.tif", "node-01.tif", "slides"]
    for path in (tmp_path / "slides").iterdir():
        assert path.read_bytes() == (written / "slides" / path.name).read_bytes()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file.*\nFix: "):
        write_cohort(tmp_path / "file")
