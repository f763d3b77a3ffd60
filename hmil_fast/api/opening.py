"""Open the run, store and slide files that a caller names, and load the run's features."""

from collections.abc import Sequence
from pathlib import Path

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.labelled import name_empty
from hmil_fast.config import Runtime
from hmil_fast.device import pick_device
from hmil_fast.errors import some
from hmil_fast.extraction.slides import collect_slides
from hmil_fast.io.store import FeatureStore, open_store
from hmil_fast.io.store.location import Location
from hmil_fast.runs.run import Run, open_run
from hmil_fast.tables import Say


def as_run(run: Run | Path | str) -> Run:
    """Return the run, opened if a path is given."""
    return run if isinstance(run, Run) else open_run(Path(run))


def as_store(run: Run, store: FeatureStore | Location | str, say: Say) -> FeatureStore:
    """Return the store, opened if a place is given; report slides that changed since the training.

    Raises:
        UsageError: Its features are of another kind than those that the run was trained on.
    """
    store = run.at_run_scales(store if isinstance(store, FeatureStore) else open_store(store))
    changed = run.changed(store)
    if changed:
        say(
            f"{len(changed)} slides have other features than when {run.path} was trained: "
            f"{some(changed)}"
        )
    return store


def slide_files(slides: Sequence[Path | str]) -> dict[str, Path]:
    """Return slide files by slide id, from files, folders and globs."""
    return {task.slide_id: task.path for task in collect_slides([*map(str, slides)])}


def run_features(
    store: FeatureStore, run: Run, say: Say, runtime: Runtime = Runtime(), views: int = 0
) -> FeatureCache:
    """Cache the features of a run's slides, and report slides without tiles."""
    # slides of one test part are adjacent, so that they are predicted without a copy
    tested = [slide_id for fold in run.folds for slide_id in fold.test]
    slide_ids = list(dict.fromkeys([*tested, *(slide.slide_id for slide in run.slides)]))
    device = pick_device(runtime.device, runtime.threads)
    cache = FeatureCache(store, slide_ids, run.path, runtime.cache, device, views)
    name_empty(cache, say)
    return cache
