"""The run, the store and the slide files that a command names, opened and checked."""

from collections.abc import Sequence
from pathlib import Path

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.labelled import name_empty
from hmil_fast.device import pick_device
from hmil_fast.errors import some
from hmil_fast.extraction.slides import collect_slides
from hmil_fast.io.store import FeatureStore, open_store
from hmil_fast.io.store.location import Location
from hmil_fast.runs.run import Run, open_run
from hmil_fast.tables import Say


def as_run(run: Run | Path | str) -> Run:
    """The run, opened if a path is given."""
    return run if isinstance(run, Run) else open_run(Path(run))


def as_store(run: Run, store: FeatureStore | Location | str, say: Say) -> FeatureStore:
    """The store, opened if a place is given; slides that changed since the training are named.

    Raises:
        UsageError: Its vectors mean something else than those that the run was trained on.
    """
    store = run.fitting(store if isinstance(store, FeatureStore) else open_store(store))
    changed = run.changed(store)
    if changed:
        say(
            f"{len(changed)} slides have other features than when {run.path} was trained: "
            f"{some(changed)}"
        )
    return store


def slide_files(slides: Sequence[Path | str]) -> dict[str, Path]:
    """The slide files by slide id, of files, folders and globs."""
    return {task.slide_id: task.path for task in collect_slides([*map(str, slides)])}


def run_features(store: FeatureStore, run: Run, say: Say, views: int = 0) -> FeatureCache:
    """The features of a run's slides; slides without tiles are named."""
    # slides that are tested together lie together: they are predicted without a copy
    tested = [slide_id for fold in run.folds for slide_id in fold.test]
    slide_ids = list(dict.fromkeys([*tested, *(slide.slide_id for slide in run.slides)]))
    device = pick_device(run.config.device)
    cache = FeatureCache(store, slide_ids, run.path, run.config.cache, device, views)
    name_empty(cache, say)
    return cache
