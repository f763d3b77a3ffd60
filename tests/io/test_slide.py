"""Real slides: facts, pixels equal to OpenSlide's, edges, threads, handles."""

import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from hmil_fast.errors import SlideError
from hmil_fast.io.slide import SlideReader, open_slide, require_mpp

SlideFile = Callable[[str], Path]
CMU = "CMU-1-Small-Region.svs"
PYRAMID = "cmu1_small_pyramid.tif"
MOSAIC = "mosaic.tif"
JPEG2000 = "cmu1_jpeg2000.svs"
DAPI = "dapi_small.ndpi"


def read(reader: SlideReader, level: int, xy: list[tuple[int, int]], size: int) -> np.ndarray:
    out = np.full((len(xy), size, size, 3), 7, np.uint8)
    status = reader.read(level, np.array(xy, np.int64), size, out)
    assert status.tolist() == [0] * len(xy)
    return out


def openslide_level0(path: Path, corner: tuple[int, int], size: int) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        tile = np.asarray(slide.read_region(corner, 0, (size, size)))
    return np.where(tile[..., 3:] == 0, 255, tile[..., :3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reader", "vendor", "codec", "mpp", "source", "power"),
    [
        (CMU, "nvimagecodec", "aperio", "jpeg", 0.499, "aperio metadata", 20.0),
        (PYRAMID, "nvimagecodec", "generic-tiff", "jpeg", 0.499, "resolution tag", None),
        (MOSAIC, "nvimagecodec", "generic-tiff", "jpeg", 0.5, "resolution tag", None),
        (JPEG2000, "nvimagecodec", "aperio", "jpeg2000", None, "none in aperio metadata", None),
        (DAPI, "openslide", "hamamatsu", "jpeg", 0.913, "openslide", 10.0),
    ],
)
def test_facts(
    slide_file: SlideFile,
    name: str,
    reader: str,
    vendor: str,
    codec: str,
    mpp: float | None,
    source: str,
    power: float | None,
) -> None:
    with open_slide(slide_file(name)) as slide:
        info = slide.info
    assert (info.reader, info.vendor, info.codec) == (reader, vendor, codec)
    assert info.mpp == (None if mpp is None else pytest.approx(mpp, rel=1e-3))
    assert (info.mpp_source, info.objective_power) == (source, power)
    with openslide.OpenSlide(slide_file(name)) as other:
        assert info.level_dimensions == other.level_dimensions


def test_level_mpp_is_the_ratio_of_widths(slide_file: SlideFile) -> None:
    with open_slide(slide_file(JPEG2000), mpp=0.5) as slide:
        assert slide.info.mpp_source == "user"
        assert slide.info.level_mpp(1) == 0.5 * 1303 / 651


def test_missing_mpp_is_refused_with_the_fix(slide_file: SlideFile) -> None:
    with open_slide(slide_file(JPEG2000)) as slide, pytest.raises(SlideError) as error:
        require_mpp(slide.info)
    assert "states no usable mpp" in error.value.what
    assert "--slide-mpp 0.5" in error.value.fix


def test_implausible_mpp_is_refused(slide_file: SlideFile) -> None:
    path = slide_file("CMU-1-Small-Region.wrong-mpp.tiff")
    with open_slide(path) as slide, pytest.raises(SlideError, match=r"0\.00499.*0\.05–20"):
        require_mpp(slide.info)
    with open_slide(path, mpp=0.499) as slide:
        assert require_mpp(slide.info) == 0.499


@pytest.mark.parametrize("name", [PYRAMID, JPEG2000])
def test_level_pixels_are_exact_where_sizes_do_not_divide(slide_file: SlideFile, name: str) -> None:
    with open_slide(slide_file(name)) as slide:
        wide, high = slide.info.level_dimensions[1]
        whole = read(slide, 1, [(0, 0)], max(wide, high))[0]
        for x, y in [(1, 1), (257, 311), (613, 517), (wide - 64, high - 64)]:
            assert np.array_equal(read(slide, 1, [(x, y)], 64)[0], whole[y : y + 64, x : x + 64])


def test_two_threads_read_what_one_reads(slide_file: SlideFile) -> None:
    rng = np.random.default_rng(1)
    with open_slide(slide_file(DAPI)) as slide:
        limit = np.array(slide.info.level_dimensions[0]) - 100
        corners = [tuple(map(int, rng.integers(limit))) for _ in range(60)]
        alone = read(slide, 0, corners, 100)
        got: list[np.ndarray] = []
        threads = [
            threading.Thread(target=lambda: got.append(read(slide, 0, corners, 100)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(got) == 2
    assert all(np.array_equal(alone, pixels) for pixels in got)


@pytest.mark.parametrize(
    ("name", "max_px"), [(CMU, 400), (MOSAIC, 1000), (DAPI, 100), (JPEG2000, 64)]
)
def test_thumbnail_shows_the_whole_slide(slide_file: SlideFile, name: str, max_px: int) -> None:
    path = slide_file(name)
    with open_slide(path) as slide, openslide.OpenSlide(path) as other:
        ours = slide.thumbnail(max_px)
        wide, high = slide.info.level_dimensions[0]
        whole = other.read_region((0, 0), 0, (wide, high)).convert("RGB")
    assert max(ours.shape[:2]) == max_px
    theirs = np.asarray(whole.resize(ours.shape[1::-1], Image.Resampling.BOX), float)
    assert np.abs(ours - theirs).mean() < 8
    assert np.abs(ours.mean((0, 1)) - theirs.mean((0, 1))).max() < 1.5


@pytest.mark.parametrize(
    ("missing", "reader", "refused"),
    [
        (["cucim"], "nvimagecodec", ""),
        (["nvidia"], "cucim", "nvImageCodec: not installed"),
        pytest.param(
            ["nvidia", "cucim"],
            "libjpeg-turbo",
            "nvImageCodec and cuCIM: not installed",
            marks=pytest.mark.skipif(not find_spec("simplejpeg"), reason="it is not installed"),
        ),
        (
            ["nvidia", "cucim", "simplejpeg"],
            "openslide",
            "nvImageCodec and cuCIM and libjpeg-turbo: not installed",
        ),
    ],
)
def test_the_next_reader_serves_where_one_is_missing(
    slide_file: SlideFile, missing: list[str], reader: str, refused: str
) -> None:
    path = slide_file(CMU)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(sys.argv[2:]))\n"
        "from pathlib import Path; from hmil_fast.io.slide import open_slide\n"
        "info = open_slide(Path(sys.argv[1])).info; print(info.reader, info.vendor, info.mpp)\n"
        "print(info.reader_reason)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), *missing],
        capture_output=True,
        text=True,
        check=True,
    )
    facts, reason = done.stdout.splitlines()
    assert facts.split() == [reader, "aperio", "0.499"]
    assert refused in reason
    assert ("not installed" in reason) == bool(refused)


@pytest.mark.slow
def test_torch_first_does_not_hang(slide_file: SlideFile, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from hmil_fast.io.slide import open_slide\n"
        "print(open_slide(Path(sys.argv[1])).info.reader)"
    )
    command = [sys.executable, "-c", code, str(slide_file(CMU))]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=600, cwd=tmp_path
    )
    assert done.stdout.strip() == "nvimagecodec"


def test_opening_prints_nothing(slide_file: SlideFile, capfd: pytest.CaptureFixture[str]) -> None:
    for name in (CMU, PYRAMID, MOSAIC, JPEG2000, DAPI):
        with open_slide(slide_file(name)) as slide:
            read(slide, 0, [(0, 0)], 32)
    assert capfd.readouterr() == ("", "")
