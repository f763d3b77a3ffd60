"""Tiles decoded in place and cut on a device: on a CPU the same pixels and status as `Band`'s."""

import threading
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmil_fast.io.slide import device_decoder as module
from hmil_fast.io.slide import open_slide
from hmil_fast.io.slide.device_band import DeviceBand
from hmil_fast.io.slide.device_decoder import DeviceDecoder, Slots
from hmil_fast.io.slide.protocol import Int64
from hmil_fast.io.slide.sources import Unsuited, cpu_decoder, load_nvimgcodec
from hmil_fast.io.slide.tiff_facts import TiffLevel
from hmil_fast.io.slide.tiled_reader import TiledReader
from hmil_fast.streams import DONE

try:
    load_nvimgcodec()
except Unsuited:
    pytest.skip("nvImageCodec is not installed", allow_module_level=True)
SlideFile = Callable[[str], Path]
CPU = torch.device("cpu")
GRIDS = ((256, 0), (224, -37), (512, 100), (96, 7), (240, 0))


@pytest.fixture
def decoder() -> DeviceDecoder:
    return DeviceDecoder(CPU)


def opened(path: Path) -> TiledReader:
    slide = open_slide(path)
    assert isinstance(slide, TiledReader)
    return slide


def corners(slide: TiledReader, level: int, size: int, start: int) -> Int64:
    wide, high = slide.info.level_dimensions[level]
    rows = product(range(start, high, size), range(start, wide, size))
    outside = [(wide + 5, 0), (-5 * size, 3)]
    return np.array([*((x, y) for y, x in rows), *outside], np.int64)


def both(
    slide: TiledReader, level: int, xy: Int64, size: int, decoder: DeviceDecoder, step: int = 40
) -> DeviceBand:
    """Read by both, some tiles at a time; the band, for what it has counted."""
    theirs = np.empty((len(xy), size, size, 3), np.uint8)
    status = slide.band(level, [(xy, size)]).read(xy, size, theirs)
    band = DeviceBand(slide, level, [(xy, size)], decoder)
    for at in range(0, len(xy), step):
        part = xy[at : at + step]
        out = torch.full((len(part), size, size, 3), 7, dtype=torch.uint8)
        band.load(part, size)
        assert np.array_equal(band.read(part, size, out), status[at : at + step])
        assert np.array_equal(out.numpy(), theirs[at : at + step])
    band.close()
    return band


def spoilt(source: Path, path: Path, tile: int = 49) -> Path:
    """One tile's bytes replaced by noise."""
    with tifffile.TiffFile(source) as file:
        page = file.pages[0]
        start, count = page.dataoffsets[tile], page.databytecounts[tile]
    raw = bytearray(source.read_bytes())
    raw[start + count // 4 : start + count] = (
        np.random.default_rng(3).integers(0, 256, count - count // 4, np.uint8).tobytes()
    )
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("name", "levels"),
    [("CMU-1-Small-Region.svs", 1), ("cmu1_small_pyramid.tif", 3), ("cmu1_jpeg2000.svs", 1)],
)
def test_pixels_and_status_are_those_of_the_band_on_the_host(
    slide_file: SlideFile, decoder: DeviceDecoder, name: str, levels: int
) -> None:
    with opened(slide_file(name)) as slide:
        for level, (size, start) in product(range(levels), GRIDS):
            band = both(slide, level, corners(slide, level, size, start), size, decoder)
            assert band.on_cpu == 0
            assert band.probe() == 0
    assert all(slots.room == len(slots) for slots in decoder._slots.values())


def test_a_corrupt_tile_has_its_status_and_spoils_no_other(
    slide_file: SlideFile, tmp_path: Path, decoder: DeviceDecoder
) -> None:
    path = spoilt(slide_file("cmu1_small_pyramid.tif"), tmp_path / "spoilt.tif")
    with opened(path) as slide:
        for size, start in GRIDS:
            xy = corners(slide, 0, size, start)
            both(slide, 0, xy, size, decoder)
            status = slide.read(0, xy, size, np.empty((len(xy), size, size, 3), np.uint8))
            assert 0 < np.count_nonzero(status) < 20


@settings(max_examples=25)
@given(
    size=st.integers(1, 700),
    xy=st.lists(st.tuples(st.integers(-800, 3000), st.integers(-800, 3500)), min_size=1),
    step=st.integers(1, 9),
)
def test_any_corners(
    slide_file: SlideFile, size: int, xy: Sequence[tuple[int, int]], step: int
) -> None:
    ordered = np.array(sorted(xy, key=lambda at: at[1]), np.int64)
    with opened(slide_file("CMU-1-Small-Region.svs")) as slide:
        both(slide, 0, ordered, size, DeviceDecoder(CPU), step)


def test_few_places_make_it_decode_again_and_change_no_pixel(
    slide_file: SlideFile, decoder: DeviceDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLOT_BYTES", 0)
    with opened(slide_file("CMU-1-Small-Region.svs")) as slide:
        for size, start in ((240, 0), (224, -37), (480, 100)):
            both(slide, 0, corners(slide, 0, size, start), size, decoder)
        assert len(decoder.slots((240, 240))) == module.MIN_SLOTS
        xy = corners(slide, 0, 900, 0)
        with pytest.raises(Unsuited, match="too many"):
            DeviceBand(slide, 0, [(xy, 900)], decoder)


class Refusing(DeviceDecoder):
    """A decoder that refuses some tiles, as a GPU's does a progressive JPEG."""

    def decode(
        self, facts: TiffLevel, data: Sequence[bytes], slots: Slots, places: Sequence[int]
    ) -> list[bool]:
        done = super().decode(facts, data, slots, places)
        for n, raw in enumerate(data):
            if sum(raw) % 3 == 0:
                slots.pixels[places[n]] = 1
                done[n] = False
        return done


def test_what_the_device_refuses_a_cpu_decodes(slide_file: SlideFile) -> None:
    with opened(slide_file("cmu1_small_pyramid.tif")) as slide:
        band = both(slide, 0, corners(slide, 0, 256, 0), 256, Refusing(CPU))
        assert 5 < band.on_cpu < len(slide.facts(0).offsets)


class Dying(DeviceDecoder):
    """A decoder that fails as a whole."""

    def decode(
        self, facts: TiffLevel, data: Sequence[bytes], slots: Slots, places: Sequence[int]
    ) -> list[bool]:
        raise RuntimeError("nvjpeg: internal error")


def test_a_decoder_that_fails_leaves_all_places_to_the_next_slide(slide_file: SlideFile) -> None:
    decoder = Dying(CPU)
    with opened(slide_file("CMU-1-Small-Region.svs")) as slide:
        xy = corners(slide, 0, 240, 0)
        band = DeviceBand(slide, 0, [(xy, 240)], decoder)
        with pytest.raises(RuntimeError, match="internal error"):
            band.probe()
        with pytest.raises(RuntimeError, match="internal error"):
            band.read(xy, 240, torch.empty(len(xy), 240, 240, 3, dtype=torch.uint8))
        band.close()
        slots = decoder.slots((240, 240))
        assert slots.room == len(slots)


class Shifting(DeviceDecoder):
    """A decoder with other colours."""

    def decode(
        self, facts: TiffLevel, data: Sequence[bytes], slots: Slots, places: Sequence[int]
    ) -> list[bool]:
        done = super().decode(facts, data, slots, places)
        slots.pixels[list(places)] = slots.pixels[list(places)].flip(-1)
        return done


def test_a_kind_of_decoder_is_taken_only_if_its_pixels_are_right(decoder: DeviceDecoder) -> None:
    from nvidia import nvimgcodec

    class Brighter:
        """As an engine that enlarges colours in another way, by more."""

        def decode(self, stream: Any, params: Any) -> Any:
            image = np.array(cpu_decoder(nvimgcodec).decode(stream, params=params).cpu())
            return nvimgcodec.as_image(np.clip(image.astype(int) + 3, 0, 255).astype(np.uint8))

    class Nothing:
        def decode(self, stream: Any, params: Any) -> None:
            return None

    assert decoder.right(cpu_decoder(nvimgcodec))
    assert not decoder.right(Brighter())
    assert not decoder.right(Nothing())


def test_a_probe_finds_other_colours(slide_file: SlideFile) -> None:
    with opened(slide_file("CMU-1-Small-Region.svs")) as slide:
        xy = corners(slide, 0, 240, 0)
        band = DeviceBand(slide, 0, [(xy, 240)], Shifting(CPU))
        with pytest.raises(Unsuited, match=r"otherwise, by \d+\.\d grey levels"):
            band.probe()


def test_rgb_with_fewer_samples_of_some_channel_goes_to_a_cpu(
    tmp_path: Path, decoder: DeviceDecoder
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    tifffile.imwrite(path := tmp_path / "a.tif", pixels, tile=(256, 256), photometric="ycbcr",
                     compression="jpeg", subsampling=(2, 2))  # fmt: skip
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags["PhotometricInterpretation"].overwrite(2)
    with opened(path) as slide:
        assert both(slide, 0, corners(slide, 0, 256, 0), 256, decoder).on_cpu == 4


def test_uncompressed_tiles_are_not_for_it(tmp_path: Path, decoder: DeviceDecoder) -> None:
    tifffile.imwrite(path := tmp_path / "a.tif", np.zeros((256, 256, 3), np.uint8),
                     tile=(256, 256), photometric="rgb")  # fmt: skip
    with opened(path) as slide, pytest.raises(Unsuited, match="no GPU decodes uncompressed tiles"):
        DeviceBand(slide, 0, [], decoder)


class Late:
    """An event that is done once somebody has waited for it."""

    def __init__(self) -> None:
        self.waited = threading.Event()

    def query(self) -> bool:
        return self.waited.is_set()

    def synchronize(self) -> None:
        self.waited.set()


def test_no_place_is_written_before_its_reader_is_done() -> None:
    slots = Slots(3, (8, 8), CPU)
    first, late = slots.take(2), Late()
    slots.give(first, late)
    assert slots.room == 3
    assert slots.take(1)[0] not in first
    assert not late.query()
    assert set(slots.take(2)) == set(first)
    assert late.query()
    slots.give([1], DONE)
    assert slots.room == 1


def test_threads_that_load_the_same_tiles(slide_file: SlideFile, decoder: DeviceDecoder) -> None:
    """A tile that a thread is still reading when it is wanted is read by who wants it."""
    with opened(slide_file("CMU-1-Small-Region.svs")) as slide:
        xy = corners(slide, 0, 300, 0)
        expected = np.empty((len(xy), 300, 300, 3), np.uint8)
        slide.read(0, xy, 300, expected)
        band = DeviceBand(slide, 0, [(xy, 300)], decoder)
        errors: list[Any] = []

        def load(start: int) -> None:
            try:
                for at in range(start, len(xy), 3):
                    band.load(xy[at : at + 5], 300)
            except BaseException as error:  # noqa: BLE001
                errors.append(error)

        threads = [threading.Thread(target=load, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        out = torch.empty(expected.shape, dtype=torch.uint8)
        for at in range(0, len(xy), 7):
            assert not band.read(xy[at : at + 7], 300, out[at : at + 7]).any()
        for thread in threads:
            thread.join()
        assert not errors
        assert np.array_equal(out.numpy(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "level"),
    [("CMU-1-Small-Region.svs", 0), ("cmu1_small_pyramid.tif", 1), ("cmu1_jpeg2000.svs", 0)],
)
def test_a_gpu_decodes_nearly_the_same(slide_file: SlideFile, name: str, level: int) -> None:
    device = torch.device("cuda", 0)
    gpu = DeviceDecoder(device)
    with opened(slide_file(name)) as slide:
        for size, start in GRIDS:
            xy = corners(slide, level, size, start)
            expected = np.empty((len(xy), size, size, 3), np.uint8)
            status = slide.read(level, xy, size, expected)
            band = DeviceBand(slide, level, [(xy, size)], gpu)
            assert band.probe() < 1
            band.load(xy, size)
            out = torch.empty(expected.shape, dtype=torch.uint8, device=device)
            assert np.array_equal(band.read(xy, size, out), status)
            torch.cuda.synchronize(device)
            apart = np.abs(out.cpu().numpy().astype(int) - expected)
            assert apart.mean() < 1
            band.close()
