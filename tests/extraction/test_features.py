"""What lies in the store: the encoder's vectors of the slide's own pixels, row by row."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import torch
from PIL import Image

from hmil_fast.extraction.encoders import Encoder
from hmil_fast.extraction.pipeline.extractor import Extractor, store_spec
from hmil_fast.extraction.pipeline.result import SlideResult
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.slide import TileStatus
from hmil_fast.io.store import FeatureStore, create_store
from hmil_fast.io.tiles.grid import TileSpec

SlideFile = Callable[[str], Path]
SVS, PYRAMID = "CMU-1-Small-Region.svs", "cmu1_small_pyramid.tif"


def extract(
    store: FeatureStore, encoder: Encoder, path: Path, **options: int
) -> tuple[SlideResult, list[int]]:
    seen: list[int] = []
    extractor = Extractor(store, encoder, TileSpec(**store.spec.tiling), **options)
    (result,) = extractor.run(
        [SlideTask(path.stem, path)], lambda task, done, total: seen.append(done)
    )
    return result, seen


def make_store(
    path: Path, encoder: Encoder, dtype: str = "float16", **tiles: float
) -> FeatureStore:
    return create_store(path, store_spec(encoder, TileSpec(**tiles), dtype))


def test_a_slide_that_changes_while_it_is_read_is_not_stored(
    slide_file: SlideFile, tmp_path: Path, encoder: Encoder
) -> None:
    path = tmp_path / "s.tif"
    path.write_bytes(slide_file(PYRAMID).read_bytes())
    store = make_store(tmp_path / "store", encoder, mpp=2.0)
    extractor = Extractor(store, encoder, TileSpec(mpp=2.0), batch=4)

    def still_copied(*_: object) -> None:
        with path.open("ab") as file:
            file.write(b"x")

    (result,) = extractor.run([SlideTask("s", path)], still_copied)
    assert result.error is not None
    assert "changed while it was read" in result.error.what
    assert store.slide_ids() == []
    (again,) = extractor.run([SlideTask("s", path)], lambda *_: None)
    assert again.error is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mpp", "level"), [(SVS, 0.5, 0), (PYRAMID, 1.0, 1)])
def test_features_are_the_encoders_of_openslides_pixels(
    slide_file: SlideFile, tmp_path: Path, encoder: Encoder, name: str, mpp: float, level: int
) -> None:
    path = slide_file(name)
    store = make_store(tmp_path / "store", encoder, mpp=mpp)
    result, seen = extract(store, encoder, path, batch=20)
    assert result.error is None
    coords, features = store.coords(path.stem), store.features(path.stem)
    assert seen[-1] == len(coords) == len(features) == result.num_tiles
    assert seen == [min(done, len(coords)) for done in range(20, len(coords) + 20, 20)]
    assert not store.status(path.stem).any()
    with openslide.OpenSlide(path) as slide:
        # whole: a region of level 1 that OpenSlide cuts out itself is a fraction of a px off
        (wide, high), size = slide.dimensions, slide.level_dimensions[level]
        drawn = slide.read_region((0, 0), level, size).convert("RGB")
    assert (coords >= 0).all()
    assert (coords < (wide, high)).all()
    assert coords.tolist() == sorted(coords.tolist(), key=lambda xy: (xy[1], xy[0]))
    assert len(np.unique(coords, axis=0)) == len(coords)
    corners = np.rint(coords * size / (wide, high)).astype(int)
    edge = (corners + 256 > size).any(axis=1)
    inside, outside = np.flatnonzero(~edge), np.flatnonzero(edge)
    assert len(outside)
    rows = [*inside[:: max(1, len(inside) // 6)], *outside[:2]]
    tiles = []
    for x, y in corners[rows].tolist():
        tile = Image.new("RGB", (256, 256), "white")
        tile.paste(drawn.crop((x, y, min(x + 256, size[0]), min(y + 256, size[1]))))
        tiles.append(np.asarray(tile.resize((224, 224), Image.Resampling.BILINEAR)))
    pixels = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float()
    expected = encoder((pixels - 127) / 128).numpy()
    ours = features[rows].astype(np.float32)
    # pillow and torch resize to within single grey levels of each other
    assert np.abs(ours - expected).mean() < 0.002
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((ours * expected).sum(1) / norms).min() > 0.9999
    other = np.roll(expected, 1, axis=0)
    assert np.abs(ours - other).mean() > 0.05  # the test sees a row in the wrong place


@pytest.mark.slow
def test_what_changes_features_and_what_does_not(
    slide_file: SlideFile, tmp_path: Path, encoder: Encoder
) -> None:
    """Bitwise equal: the same settings, any number of threads. Else: float rounding only."""
    path = slide_file(PYRAMID)

    def run(name: str, **options: int) -> tuple[str, np.ndarray]:
        store = make_store(tmp_path / name, encoder, "float32", mpp=1.0)
        result, _ = extract(store, encoder, path, **options)
        assert result.error is None
        return store.record(path.stem).content_digest, store.features(path.stem)

    first, features = run("first", batch=16, threads=2)
    again, _ = run("again", batch=16, threads=2)
    threads, _ = run("threads", batch=16, threads=5)
    assert first == again == threads
    for batch in (1, 7, 64):
        _, other = run(f"batch{batch}", batch=batch, threads=2)
        np.testing.assert_allclose(other, features, rtol=1e-4, atol=1e-5)


def test_what_the_slide_was_is_stored(
    slide_file: SlideFile, tmp_path: Path, encoder: Encoder
) -> None:
    path = slide_file(PYRAMID)
    store = make_store(tmp_path / "store", encoder, mpp=2.0)
    extract(store, encoder, path)
    attrs = store.record(path.stem).attrs
    assert attrs["reader"] == "nvimagecodec"
    assert attrs["level"] == 2
    assert attrs["mpp"]["effective"] == pytest.approx(1.996, abs=1e-3)
    source = attrs["source"]
    assert (source["file"], source["bytes"]) == (path.name, path.stat().st_size)
    assert source["digest"].startswith("sha256:")
    assert store.spec.encoder["weights_sha256"] == encoder.weights_sha256
    thumbnail = store.file(path.stem, "thumbnail.jpg")
    assert thumbnail is not None
    assert thumbnail[:3] == b"\xff\xd8\xff"


def corrupt(path: Path, source: Path, tiles: list[tuple[int, int]]) -> None:
    """Scramble 256-px tiles of level 0, given by their top-left corners."""
    raw = bytearray(source.read_bytes())
    with tifffile.TiffFile(source) as tiff:
        page = tiff.pages[0]
        for x, y in tiles:
            number = y // 256 * -(-2220 // 256) + x // 256
            at, count = page.dataoffsets[number], page.databytecounts[number]
            noise = np.random.default_rng(3).integers(0, 256, count - count // 4, np.uint8)
            raw[at + count // 4 : at + count] = noise.tobytes()
    path.write_bytes(raw)


@pytest.mark.slow
def test_up_to_a_tenth_of_corrupt_tiles_are_rows_of_zeros_and_more_refuse_the_slide(
    slide_file: SlideFile, tmp_path: Path, encoder: Encoder
) -> None:
    store = make_store(tmp_path / "store", encoder)
    good = slide_file(PYRAMID)
    extract(store, encoder, good)
    coords = store.coords(good.stem)
    most = len(coords) // 10
    rows = np.arange(20, 20 + most)
    hurt, worse = tmp_path / "hurt.tif", tmp_path / "worse.tif"
    corrupt(hurt, good, coords[rows].tolist())
    result, _ = extract(store, encoder, hurt)
    assert result.error is None
    # the same tiles: what the thumbnail cannot show is not taken for glass
    assert np.array_equal(store.coords("hurt"), coords)
    assert result.bad_tiles == most > 1
    assert store.record("hurt").attrs["bad_tiles"] == most
    assert store.record(good.stem).attrs["bad_tiles"] == 0
    status = store.status("hurt")
    assert np.flatnonzero(status).tolist() == rows.tolist()
    assert set(status[rows]) == {TileStatus.CORRUPT}
    features = store.features("hurt")
    assert not features[rows].any()
    rest = np.setdiff1d(np.arange(len(coords)), rows)
    assert np.array_equal(features[rest], store.features(good.stem)[rest])

    corrupt(worse, good, coords[20 : 21 + most].tolist())
    result, _ = extract(store, encoder, worse)
    assert result.error is not None
    assert f"{most + 1} of {len(coords)} tiles cannot be decoded" in result.error.what
    assert "copy the file again" in result.error.fix
    assert store.slide_ids() == sorted([good.stem, "hurt"])
    assert list((tmp_path / "store" / "slides").glob("worse*/a-*")) == []
    assert all(finding.ok for finding in store.verify())


def test_features_too_large_for_the_dtype_name_the_one_that_fits(
    slide_file: SlideFile, tmp_path: Path, encoder: Encoder
) -> None:
    class Loud(Encoder):
        def forward(self, tiles: torch.Tensor) -> torch.Tensor:
            return super().forward(tiles) * 1e6

    loud = Loud(encoder.card, encoder.model, encoder.device)
    path = slide_file(PYRAMID)
    half = make_store(tmp_path / "half", loud, mpp=2.0)
    result, _ = extract(half, loud, path)
    assert result.error is not None
    assert "not finite in float16" in result.error.what
    assert "--dtype float32" in result.error.fix
    assert half.slide_ids() == []
    full = make_store(tmp_path / "full", loud, "float32", mpp=2.0)
    assert extract(full, loud, path)[0].error is None


def test_a_slide_without_tissue_is_an_empty_bag(tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "glass.tif"
    white = np.full((1024, 1024, 3), 243, np.uint8)
    tifffile.imwrite(
        path, white, tile=(256, 256), photometric="rgb",
        resolution=(20_000, 20_000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    store = make_store(tmp_path / "store", encoder)
    result, _ = extract(store, encoder, path)
    assert result.error is None
    assert "no tissue" in str(result.notes)
    assert store.features("glass").shape == (0, 1280)
    assert all(finding.ok for finding in store.verify())


def test_an_error_amid_a_slide_leaves_no_thread_on_the_closed_file(
    slide_file: SlideFile, tmp_path: Path, encoder: Encoder
) -> None:
    import threading

    class Failing(Encoder):
        def forward(self, tiles: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    store = make_store(tmp_path / "store", encoder)
    failing = Failing(encoder.card, encoder.model, encoder.device)
    good = slide_file(SVS)
    extractor = Extractor(store, failing, TileSpec(), batch=2, threads=4)
    tasks = [SlideTask("a", good), SlideTask("b", good)]
    for result in extractor.run(tasks, lambda task, done, total: None):
        assert result.error is not None
        assert "out of memory" in result.error.what
        assert "smaller --batch-size" in result.error.fix
    names = [thread.name for thread in threading.enumerate()]
    ours = ("decode", "feed", "open-slide", "write", "commit")
    assert not [name for name in names if name.startswith(ours)]
    assert store.slide_ids() == []
    log = json.dumps([str(path) for path in (tmp_path / "store").rglob("a-*")])
    assert log == "[]"
