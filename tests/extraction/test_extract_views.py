"""`extract --views` and `--stain-norm`: what lies in the store, and what it does not depend on."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from hmil_fast.errors import StoreError, UsageError
from hmil_fast.extraction.encoders import Encoder
from hmil_fast.extraction.pipeline.extractor import Extractor, store_spec
from hmil_fast.extraction.pipeline.result import SlideResult
from hmil_fast.extraction.prepare import prepare_slide
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.slide import open_slide
from hmil_fast.io.store import FeatureStore, at_scale, at_view, create_store, open_store
from hmil_fast.io.tiles.augment import Augmentation
from hmil_fast.io.tiles.grid import TileSpec
from hmil_fast.io.tiles.stain import fit_macenko
from hmil_fast.io.tiles.transform import build_transform

SlideFile = Callable[[str], Path]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
SPEC = TileSpec(mpp=2.0, views=1, view_seed=5)


@pytest.fixture
def tasks(slide_file: SlideFile) -> list[SlideTask]:
    path = slide_file("cmu1_small_pyramid.tif")
    return [SlideTask(name, path, mpp) for name, mpp in (("a", 0.5), ("b", 0.7))]


def extract(
    path: Path, encoder: Encoder, tasks: list[SlideTask], spec: TileSpec = SPEC, **options: int
) -> tuple[FeatureStore, list[SlideResult], list[tuple[int, int]]]:
    store = create_store(path, store_spec(encoder, spec, "float16"))
    seen: list[tuple[int, int]] = []
    extractor = Extractor(store, encoder, spec, **{"batch": 8, "threads": 2} | options)
    results = list(extractor.run(tasks, lambda task, done, n: seen.append((done, n))))
    assert [result.error for result in results] == [None] * len(tasks)
    return store, results, seen


def expected(
    encoder: Encoder, task: SlideTask, coords: np.ndarray, spec: TileSpec, view: int
) -> np.ndarray:
    """Features of one view, made tile by tile."""
    card = encoder.card
    with open_slide(task.path, mpp=task.mpp) as slide:
        level = max(i for i in range(3) if slide.info.level_mpp(i) <= spec.mpp * 1.01)
        px = round(256 * spec.mpp / slide.info.level_mpp(level))
        wide = slide.info.level_dimensions
        xy = np.rint(coords * wide[level][0] / wide[0][0]).astype(np.int64)
        pixels = np.empty((len(xy), px, px, 3), np.uint8)
        slide.read(level, xy, px, pixels)
        transform = build_transform(
            read_px=px, input_px=card.resize_px, mean=card.mean, std=card.std,
            interpolation=card.interpolation, batch=1, device=torch.device("cpu"),
        )  # fmt: skip
        rows = []
        for tile, at in zip(pixels, coords.astype(np.int64), strict=True):
            how = {"slide_id": task.slide_id, "view": view, "seed": spec.view_seed}
            params = Augmentation().params(at[None], **how) if view else None
            rows.append(encoder(transform(tile[None], params=params)).numpy())
    return np.concatenate(rows)


def test_views_are_those_of_the_tiles_own_numbers(
    tmp_path: Path, encoder: Encoder, tasks: list[SlideTask]
) -> None:
    store, results, seen = extract(tmp_path / "s", encoder, tasks, batch=4)
    assert [result.num_tiles for result in results] == [
        store.record(name).num_tiles for name in "ab"
    ]
    assert all(done <= n for done, n in seen)
    assert seen[-1][0] == seen[-1][1] == results[-1].num_tiles
    for task in tasks:
        coords = store.coords(task.slide_id)
        for view in range(2):
            found = at_view(store, view).features(task.slide_id).astype(np.float32)
            ours = expected(encoder, task, coords, SPEC, view)
            assert np.abs(found - ours).max() < 0.01 * np.abs(ours).max()
    plain, one = (at_view(store, view).features("a") for view in range(2))
    assert np.abs(plain - one).mean() > 10 * np.finfo(np.float16).eps
    assert all(finding.ok for finding in store.verify())


def test_bits_do_not_depend_on_batches_order_or_neighbours(
    tmp_path: Path, encoder: Encoder, tasks: list[SlideTask]
) -> None:
    spec = TileSpec(mpp=4.0, views=2, view_seed=5)

    def digests(store: FeatureStore) -> list[str]:
        return [store.record(name).content_digest for name in "ab"]

    first, *_ = extract(tmp_path / "1", encoder, tasks, spec, batch=4)
    back, *_ = extract(tmp_path / "2", encoder, tasks[::-1], spec, batch=4, threads=3)
    assert digests(back) == digests(first)
    extract(tmp_path / "3", encoder, tasks[1:], spec, batch=4)
    resumed, *_ = extract(tmp_path / "3", encoder, tasks[:1], spec, batch=4)
    assert digests(resumed) == digests(first)
    # a store without views holds the same plain features
    alone, *_ = extract(tmp_path / "4", encoder, tasks[:1], TileSpec(mpp=4.0), batch=4)
    np.testing.assert_array_equal(alone.features("a"), first.features("a"))
    with pytest.raises(StoreError, match=r"views\.seed"):
        extract(tmp_path / "1", encoder, tasks, TileSpec(mpp=4.0, views=2))


def test_views_of_two_scales(tmp_path: Path, encoder: Encoder, tasks: list[SlideTask]) -> None:
    spec = TileSpec(mpp=4.0, coarser=(8.0,), views=1)
    store, *_ = extract(tmp_path / "s", encoder, tasks[:1], spec, batch=4)
    for mpp in spec.scales:
        seen = at_scale(store, mpp)
        found = at_view(seen, 1).features("a").astype(np.float32)
        ours = expected(encoder, tasks[0], seen.coords("a"), TileSpec(mpp=mpp), 1)
        assert np.abs(found - ours).max() < 0.01 * np.abs(ours).max()


def test_stain_norm_is_the_slides_own_and_kept(
    tmp_path: Path, encoder: Encoder, tasks: list[SlideTask]
) -> None:
    with tifffile.TiffFile(tasks[0].path) as file:
        grey = np.repeat(file.pages[1].asarray().mean(2, keepdims=True), 3, axis=2)
    tifffile.imwrite(tmp_path / "grey.tif", grey.astype(np.uint8), tile=(256, 256))
    colourless = SlideTask("grey", tmp_path / "grey.tif", 1.0)
    spec = TileSpec(mpp=4.0, stain_norm="macenko")
    store, results, _ = extract(tmp_path / "s", encoder, [tasks[0], colourless], spec)
    plain, *_ = extract(tmp_path / "p", encoder, [tasks[0], colourless], TileSpec(mpp=4.0))
    kept = store.record("a").attrs["stain"]
    assert kept["note"] is None
    ready = prepare_slide(tasks[0], TileSpec(mpp=4.0))
    with ready.reader:
        fit = fit_macenko(ready.thumbnail, ready.tissue.mask)
    assert np.array_equal(kept["od_matrix"], fit.matrix)
    assert np.abs(store.features("a") - plain.features("a")).mean() > 0.01
    # nothing to fit: as it is, and said so
    note = store.record("grey").attrs["stain"]["note"]
    assert note.startswith("stain not normalised")
    assert note in str(results[1].notes)
    np.testing.assert_array_equal(store.features("grey"), plain.features("grey"))
    assert "stain" not in plain.record("a").attrs
    assert plain.spec.config_hash != store.spec.config_hash


def test_the_command(tmp_path: Path, cli: Cli, encoder: Encoder, slide_file: SlideFile) -> None:
    slide, path = slide_file("cmu1_small_pyramid.tif"), tmp_path / "s"
    asked = ("extract", slide, "--store", path, "--mpp", 4, "--views", 2, "--view-seed", 3)
    done = cli(*asked, "--stain-norm", "macenko", "--batch-size", 4)
    assert done.returncode == 0, done.stderr
    store = open_store(path)
    assert store.info()["views"] == 2
    assert store.info()["tiling"]["views"]["seed"] == 3
    assert store.info()["tiling"]["stain_norm"]["method"] == "macenko"
    assert [finding.ok for finding in store.verify()] == [True]
    assert len(at_view(store, 2).features(slide.stem)) == store.info()["tiles"]
    with pytest.raises(StoreError, match=r"tiling\.stain_norm"):
        create_store(path, store_spec(encoder, TileSpec(mpp=4.0, views=2, view_seed=3), "float16"))


@pytest.mark.parametrize("bad", [{"stain_norm": "reinhard"}, {"views": -1}, {"view_seed": -1}])
def test_what_makes_no_sense_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        TileSpec(**bad)  # type: ignore[arg-type]
