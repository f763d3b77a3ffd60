"""Several scales in one pass are what a pass for each would have made."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from hmil_fast.cli.main import main
from hmil_fast.extraction.encoders import Encoder
from hmil_fast.extraction.pipeline.extractor import Extractor, store_spec
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.store import FeatureStore, at_scale, create_store, open_store
from hmil_fast.io.tiles.grid import TileSpec

SlideFile = Callable[[str], Path]
SCALES = (1.0, 2.0)


@pytest.fixture
def tasks(slide_file: SlideFile) -> list[SlideTask]:
    """A pyramid, read at a level for each scale, and a slide of one level, which all share."""
    names = ("cmu1_small_pyramid.tif", "CMU-1-Small-Region.svs")
    return [SlideTask(Path(name).stem, slide_file(name), mpp=0.5) for name in names]


def extract(
    path: Path, encoder: Encoder, spec: TileSpec, tasks: Sequence[SlideTask]
) -> FeatureStore:
    store = create_store(path, store_spec(encoder, spec, "float16"))
    extractor = Extractor(store, encoder, spec, batch=16, threads=2)
    for result in extractor.run(tasks, lambda task, done, total: None):
        assert result.error is None
    return store


@pytest.mark.slow
def test_together_and_alone_are_the_same_bits(
    tmp_path: Path, encoder: Encoder, tasks: list[SlideTask]
) -> None:
    spec = TileSpec(224, 1.0, coarser=SCALES[1:])
    several = extract(tmp_path / "several", encoder, spec, tasks)
    assert [finding.ok for finding in several.verify()] == [True, True]
    shared = several.record(tasks[1].slide_id)
    assert [shared.attrs["level"], shared.scales[0].attrs["level"]] == [0, 0]
    for mpp in SCALES:
        alone = extract(tmp_path / f"{mpp}", encoder, TileSpec(224, mpp), tasks)
        seen = at_scale(several, mpp)
        for task in tasks:
            ours, theirs = (store.record(task.slide_id) for store in (seen, alone))
            assert ours.attrs == theirs.attrs
            if mpp == SCALES[0]:
                assert ours.content_digest == theirs.content_digest
            where = {tuple(c): i for i, c in enumerate(seen.coords(task.slide_id).tolist())}
            rows = [where[tuple(c)] for c in alone.coords(task.slide_id).tolist()]
            np.testing.assert_array_equal(
                seen.features(task.slide_id)[rows], alone.features(task.slide_id)
            )
    finer, coarser = (at_scale(several, mpp) for mpp in SCALES)
    for task in tasks:
        corner = coarser.coords(task.slide_id)[finer.parent(task.slide_id)]
        side = finer.record(task.slide_id).attrs["tile_px_level0"]
        inside = finer.coords(task.slide_id) + side / 2 - corner
        assert (inside > 0).all()
        assert (inside < coarser.record(task.slide_id).attrs["tile_px_level0"]).all()


@pytest.mark.slow
def test_the_command_takes_scales_and_resumes(
    tmp_path: Path, slide_file: SlideFile, capsys: pytest.CaptureFixture[str], own_signals: None
) -> None:
    slide, store = slide_file("cmu1_small_pyramid.tif"), tmp_path / "store"
    arguments = ["extract", str(slide), "--store", str(store), "--device", "cpu", "--mpp", "2"]
    assert main([*arguments, "--mpp", "1"]) == 0
    made = open_store(store)
    assert made.spec.scales == (1.0, 2.0)
    counts = {row["mpp"]: row["tiles"] for row in made.info()["scales"]}
    assert counts[1.0] > counts[2.0] > 0
    capsys.readouterr()
    assert main([*arguments, "--mpp", "1"]) == 0
    assert "1 were done before" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "tiling.coarser: --mpp 2 in the store, none asked for" in capsys.readouterr().err


def test_a_scale_is_exported(
    tmp_path: Path,
    encoder: Encoder,
    tasks: list[SlideTask],
    capsys: pytest.CaptureFixture[str],
    own_signals: None,
) -> None:
    spec = TileSpec(224, 2.0, coarser=(4.0,))
    store = extract(tmp_path / "store", encoder, spec, tasks[:1])
    slide_id = tasks[0].slide_id
    sizes = [at_scale(store, mpp).record(slide_id).num_tiles for mpp in spec.scales]
    assert main(["store", "info", str(store.path)]) == 0
    said = json.loads(capsys.readouterr().out)["slide_ids"][slide_id]
    assert [scale["tiles"] for scale in said["scales"]] == sizes
    for mpp, more in ((2.0, []), (4.0, ["--mpp", "4"])):
        out = tmp_path / f"npy-{mpp}"
        assert main(["store", "export", str(store.path), str(out), "--format", "npy", *more]) == 0
        features = np.load(next(out.rglob(f"{slide_id}.npy")))
        np.testing.assert_array_equal(features, at_scale(store, mpp).features(slide_id))
    where = [str(store.path), str(tmp_path / "x"), "--format", "npy", "--mpp", "1"]
    assert main(["store", "export", *where]) == 2
    assert "its scales are 2 and 4" in capsys.readouterr().err
