"""Present one augmented view of a store's tiles as a store."""

from hmil_fast.errors import UsageError
from hmil_fast.io.store.reader import AttemptReader
from hmil_fast.io.store.store import FeatureStore
from hmil_fast.io.store.store_view import StorePart


def at_view(store: FeatureStore, view: int) -> FeatureStore:
    """A store's slides with the features of one view; all else is as of the plain tiles.

    Args:
        store: A store, one of its scales (`at_scale`), or all of them joined (`join_scales`).
        view: 0 for the tiles as they are, which gives the store back; else from 1.

    Raises:
        UsageError: The store has no such view.
    """
    if not 0 <= view <= store.spec.views:
        raise UsageError(
            f"view {view} of the store {store.path}, which holds {store.spec.views}",
            "choose one that is there, or extract into a new --store with more --views",
        )
    if isinstance(store, StorePart):
        return store.of(at_view(store.whole, view))
    return _View(store, view) if view else store


class _View(StorePart):
    """A store seen in one view."""

    def __init__(self, whole: FeatureStore, view: int) -> None:
        super().__init__(whole, whole.spec)
        self._view = view

    def of(self, whole: FeatureStore) -> FeatureStore:
        return whole  # already in the view that is asked for

    def _part(self, whole: AttemptReader) -> AttemptReader:
        return AttemptReader(whole.folder, whole.record, whole.prefix, self._view)
