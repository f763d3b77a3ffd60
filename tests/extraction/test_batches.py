"""Batches across slides: what they must not change, and whom a failing slide must not hurt."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from hmil_fast.extraction.encoders import Encoder
from hmil_fast.extraction.pipeline.extractor import Extractor, store_spec
from hmil_fast.extraction.pipeline.result import SlideResult
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.store import FeatureStore, create_store
from hmil_fast.io.tiles.grid import TileSpec

SlideFile = Callable[[str], Path]
BATCH = 8
SPEC = TileSpec(mpp=2.0)


class Watched(Encoder):
    """Notes the shapes it sees; rows of near-black tiles become infinite."""

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        self.shapes = [*getattr(self, "shapes", []), tuple(tiles.shape)]
        features = super().forward(tiles)
        return torch.where(tiles.mean((1, 2, 3))[:, None] < -0.85, torch.inf, features)


@pytest.fixture
def watched(encoder: Encoder) -> Watched:
    return Watched(encoder.card, encoder.model, encoder.device)


@pytest.fixture
def tasks(slide_file: SlideFile) -> list[SlideTask]:
    """One file at three resolutions: three slides whose tiles are read at other sizes."""
    path = slide_file("cmu1_small_pyramid.tif")
    return [SlideTask(name, path, mpp) for name, mpp in (("a", 0.5), ("b", 0.7), ("c", 0.4))]


def new_store(path: Path, encoder: Encoder) -> FeatureStore:
    return create_store(path, store_spec(encoder, SPEC, "float16"))


def extract(
    store: FeatureStore,
    encoder: Encoder,
    tasks: Sequence[SlideTask],
    on_tiles: Callable[[SlideTask, int, int], None] = lambda task, done, total: None,
    **options: int,
) -> dict[str, SlideResult]:
    extractor = Extractor(store, encoder, SPEC, **{"batch": BATCH, "threads": 2} | options)
    return {result.slide_id: result for result in extractor.run(tasks, on_tiles)}


def digests(store: FeatureStore) -> dict[str, str]:
    return {name: store.record(name).content_digest for name in store.slide_ids()}


def test_bits_do_not_depend_on_neighbours_order_threads_or_resume(
    tmp_path: Path, watched: Watched, tasks: list[SlideTask]
) -> None:
    together = new_store(tmp_path / "together", watched)
    results = extract(together, watched, tasks)
    counts = [results[name].num_tiles for name in "abc"]
    total = sum(counts)
    assert all(count % BATCH for count in np.cumsum(counts)), "no slide ends inside a batch"
    assert watched.shapes == [(BATCH, 3, 224, 224)] * -(-total // BATCH)
    expected = digests(together)
    assert len(set(expected.values())) == 3

    backwards = new_store(tmp_path / "backwards", watched)
    extract(backwards, watched, tasks[::-1], threads=5)
    assert digests(backwards) == expected

    resumed = new_store(tmp_path / "resumed", watched)
    extract(resumed, watched, tasks[1:2])
    extract(resumed, watched, [tasks[2], tasks[0]])
    assert digests(resumed) == expected


def dark_slide(path: Path) -> Path:
    pixels = np.full((512, 512, 3), 12, np.uint8)
    pixels[:256] = 240
    tifffile.imwrite(
        path, pixels, tile=(256, 256), photometric="rgb",
        resolution=(5_000, 5_000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


def test_a_failing_slide_hurts_no_other_one_in_its_batch(
    tmp_path: Path, watched: Watched, tasks: list[SlideTask]
) -> None:
    alone = new_store(tmp_path / "alone", watched)
    extract(alone, watched, [tasks[0], tasks[2]])

    store = new_store(tmp_path / "store", watched)
    torn, nowhere = SlideTask("torn", tasks[1].path, 0.7), SlideTask("x", tmp_path / "none.svs")
    dark = SlideTask("dark", dark_slide(tmp_path / "dark.tif"))

    def tear(task: SlideTask, done: int, total: int) -> None:
        if task.slide_id == "torn":
            for attempt in (store.path / "slides" / "torn").glob("a-*"):
                shutil.rmtree(attempt)

    results = extract(store, watched, [tasks[0], dark, torn, nowhere, tasks[2]], tear)
    errors = {name: result.error.what for name, result in results.items() if result.error}
    assert sorted(errors) == ["dark", "torn", "x"]
    assert "not finite" in errors["dark"]
    assert "torn" in errors["torn"]
    assert "none.svs" in errors["x"]
    assert digests(store) == digests(alone)
    assert list((store.path / "slides").glob("[dtx]*/a-*")) == []


def test_an_encoder_that_fails_once_costs_the_slides_of_that_batch(
    tmp_path: Path, encoder: Encoder, tasks: list[SlideTask]
) -> None:
    class Once(Encoder):
        calls = 0

        def forward(self, tiles: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
            return super().forward(tiles)

    once = Once(encoder.card, encoder.model, encoder.device)
    store = new_store(tmp_path / "store", once)
    results = extract(store, once, tasks, batch=4)
    assert results["a"].error is not None
    assert "smaller --batch-size" in results["a"].error.fix
    assert store.slide_ids() == ["b", "c"]


def test_nothing_is_held_back_while_the_next_slide_is_waited_for(
    tmp_path: Path, watched: Watched, tasks: list[SlideTask]
) -> None:
    """Else two processes, each with a part of a batch, would wait for each other's slides."""
    store = new_store(tmp_path / "store", watched)
    left, under_way = list(tasks), set[str]()

    def take(ahead: bool) -> SlideTask | None:
        if ahead and len(left) < 3:
            return None
        assert ahead or not under_way
        if not left:
            return None
        under_way.add(left[0].slide_id)
        return left.pop(0)

    extractor = Extractor(store, watched, SPEC, batch=BATCH, threads=2)
    for result in extractor.run_from(take, lambda task, done, total: None):
        assert result.error is None
        under_way.remove(result.slide_id)
    assert store.slide_ids() == ["a", "b", "c"]
    assert len(watched.shapes) == sum(-(-len(store.status(name)) // BATCH) for name in "abc")


def test_a_consumer_that_leaves_leaves_nothing_behind(
    tmp_path: Path, watched: Watched, tasks: list[SlideTask]
) -> None:
    store = new_store(tmp_path / "store", watched)
    extractor = Extractor(store, watched, SPEC, batch=4, threads=2)
    many = [
        SlideTask(f"{task.slide_id}{n}", task.path, task.mpp) for n in range(4) for task in tasks
    ]
    results = extractor.run(many, lambda task, done, total: None)
    assert next(results).error is None
    results.close()
    attempts = [path.parent.name for path in (store.path / "slides").glob("*/a-*")]
    assert sorted(attempts) == store.slide_ids()
    assert 1 <= len(attempts) < len(many)
