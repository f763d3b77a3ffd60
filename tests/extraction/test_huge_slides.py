"""Slides whose only level is huge: read in bounded memory, with progress, or refused."""

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hmil_fast.errors import SlideError
from hmil_fast.extraction.prepare import prepare_slide
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.slide import open_slide
from hmil_fast.io.tiles.grid import TileSpec

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
TILE = 512
RNG = np.random.default_rng(4)
STREAKS = RNG.integers(60, 250, (TILE, 1, 3)).repeat(TILE, axis=1).astype(np.uint8)


def write(path: Path, size: tuple[int, int], pixels: np.ndarray, tile: int = TILE) -> Path:
    """An uncompressed slide of one level, 0.5 µm per px, whose tiles are all the same bytes."""
    count = -(-size[0] // tile) * -(-size[1] // tile)
    raw = bytearray(b"II*\0") + bytes(4) + pixels.tobytes()
    offsets, counts = len(raw), len(raw) + 4 * count
    raw += struct.pack("<I", 8) * count + struct.pack("<I", pixels.nbytes) * count
    bits, resolution = len(raw), len(raw) + 6
    raw += struct.pack("<3H2I", 8, 8, 8, 20_000, 1)
    raw[4:8] = struct.pack("<I", len(raw))
    tags = [
        (256, 4, 1, size[0]), (257, 4, 1, size[1]), (258, 3, 3, bits), (259, 3, 1, 1),
        (262, 3, 1, 2), (277, 3, 1, 3), (282, 5, 1, resolution), (283, 5, 1, resolution),
        (284, 3, 1, 1), (296, 3, 1, 3), (322, 4, 1, tile), (323, 4, 1, tile),
        (324, 4, count, offsets), (325, 4, count, counts),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    path.write_bytes(raw + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


def test_a_huge_level_is_read_in_parts_with_progress(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", (17_000, 16_000), STREAKS)
    told: list[tuple[float, int]] = []
    with open_slide(path) as slide:
        thumbnail = slide.thumbnail(2000, lambda share, px: told.append((share, px)))
    assert thumbnail.shape == (1882, 2000, 3)
    assert told[0] == (0.0, 17_000 * 16_000)
    assert [share for share, _ in told] == sorted({n / 32 for n in range(32)})
    assert np.abs(thumbnail.mean((0, 1)) - STREAKS.mean((0, 1))).max() < 1
    assert np.array_equal(thumbnail[:, :1], thumbnail[:, 1500:1501])


def test_what_progress_raises_ends_the_search(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", (17_000, 16_000), STREAKS)
    told = []

    def stop(share: float, px: int) -> None:
        told.append(share)
        if share > 0.05:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        prepare_slide(SlideTask("a", path), TileSpec(), stop)
    assert len(told) == 3


@pytest.mark.slow
def test_doctor_and_extract_say_how_far_the_search_is(tmp_path: Path, cli: Cli) -> None:
    path = write(tmp_path / "a.tif", (17_000, 16_000), np.full((TILE, TILE, 3), 230, np.uint8))
    for words in (["doctor", path], ["extract", path, "--store", tmp_path / "store"]):
        done = cli(*words)
        assert "a: looking for tissue, 0% of 0.3 gigapixels" in done.stderr
        assert "a: looking for tissue, 50% of 0.3 gigapixels" in done.stderr


@pytest.mark.parametrize(
    ("size", "tile", "told"),
    [
        ((3_000_000_000, 600), 4096, "claims 3,000,000,000 × 600 px"),
        ((400_000, 400_000), 4096, "has no level smaller than 400,000 × 400,000 px"),
        ((60_000, 60_000), 16_384, "each of which takes 1.1 GB to read"),
    ],
)
def test_what_would_cost_too_much_is_refused_with_its_reason(
    tmp_path: Path, size: tuple[int, int], tile: int, told: str
) -> None:
    path = write(tmp_path / "a.tif", size, STREAKS, tile)
    with pytest.raises(SlideError) as error:
        prepare_slide(SlideTask("a", path), TileSpec())
    assert told in error.value.what
    assert error.value.fix


def test_directories_that_share_bytes_or_have_no_end_are_refused(tmp_path: Path) -> None:
    """Each tag is small on disk, but a parser would make objects of all they claim."""
    long = struct.pack("<HHII", 270, 4, 50_000, 8)
    shared = b"II*\0" + struct.pack("<I", 200_008) + bytes(200_000)
    shared += struct.pack("<H", 1000) + long * 1000 + bytes(4)
    many = b"II*\0\x08\0\0\0" + b"".join(
        struct.pack("<HI", 0, 8 + 6 * (n + 1)) for n in range(20_000)
    )
    around = b"II*\0\x08\0\0\0" + struct.pack("<HI", 0, 8)
    for raw, told in (
        (shared, "its tags claim 200,000,000 bytes"),
        (many, "more than 1,024 directories"),
        (around, "lead back to each other"),
    ):
        path = tmp_path / "a.tif"
        path.write_bytes(raw)
        with pytest.raises(SlideError, match="damaged") as error:
            open_slide(path)
        assert told in error.value.what
