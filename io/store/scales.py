"""One scale of a store that holds several, read as if the store had no other."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hmil_fast.errors import StoreError, UsageError
from hmil_fast.io.store.reader import AttemptReader
from hmil_fast.io.store.store import FeatureStore
from hmil_fast.io.store.verify import Finding
from hmil_fast.io.store.writer import SlideWriter

_SAME_MPP = 0.01


def at_scale(store: FeatureStore, mpp: float | None = None) -> FeatureStore:
    """A store's slides at one scale: their features, coordinates, facts and digests are of it.

    Nothing is copied: each scale lies in arrays of its own.

    Args:
        store: A store of one scale, which comes back as it is, or of several.
        mpp: µm per px asked for at extraction; the finest scale by default.

    Raises:
        UsageError: The store has no scale within 1 % of that.
    """
    scales = store.spec.scales
    scale = 0
    if mpp is not None:
        # imported features may not say their mpp
        near = [i for i, m in enumerate(scales) if m and abs(float(m) / mpp - 1) <= _SAME_MPP]
        if not near:
            there = " and ".join("unknown" if m is None else f"{m:g}" for m in scales)
            raise UsageError(
                f"the store {store.path} has no features at {mpp:g} µm per px, its scale is {there}"
                if len(scales) == 1
                else f"the store {store.path} has no features at {mpp:g} µm per px, its scales are "
                f"{there}",
                "choose one that is there, or extract into a new --store with this --mpp",
            )
        scale = near[0]
    return store if len(scales) == 1 else _Scale(store, scale)


class _Scale(FeatureStore):
    """A store of several scales, seen at one; writing and checking are of whole slides."""

    def __init__(self, whole: FeatureStore, scale: int) -> None:
        super().__init__(whole.path, whole.spec.at(scale), whole.uuid)
        self._whole, self._scale = whole, scale

    def _reader(self, slide_id: str) -> AttemptReader:
        reader = self._readers.get(slide_id)
        if reader is None:
            whole = self._whole._reader(slide_id)
            record = whole.record
            prefix = "" if not self._scale else record.scales[self._scale - 1].prefix
            reader = AttemptReader(whole.folder, record.at(self._scale), prefix)
            self._readers[slide_id] = reader
        return reader

    def writer(
        self,
        slide_id: str,
        num_tiles: int,
        attrs: dict[str, Any],
        coarser: Sequence[tuple[int, dict[str, Any]]] = (),
    ) -> SlideWriter:
        raise StoreError(
            f"slide {slide_id!r} would be written at one of the store's scales",
            "Write through the store itself, all scales at once.",
        )

    def verify(self, slide_ids: Iterable[str] | None = None) -> Iterator[Finding]:
        return self._whole.verify(slide_ids)

    def drop(self, slide_id: str) -> None:
        self._readers.pop(slide_id, None)
        self._whole.drop(slide_id)
