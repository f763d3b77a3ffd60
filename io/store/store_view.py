"""Present a part of a store as a store."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hmil_fast.errors import StoreError
from hmil_fast.io.store.reader import AttemptReader
from hmil_fast.io.store.schema import StoreSpec
from hmil_fast.io.store.store import FeatureStore
from hmil_fast.io.store.verify import Finding
from hmil_fast.io.store.writer import SlideWriter


class StorePart(FeatureStore):
    """Reads only: writing, checking and dropping are of whole slides.

    Args:
        whole: The store.
        spec: What the slides share in this part.

    Attributes:
        whole: The store.
    """

    def __init__(self, whole: FeatureStore, spec: StoreSpec) -> None:
        super().__init__(whole.path, spec, whole.uuid)
        self.whole = whole

    def of(self, whole: FeatureStore) -> FeatureStore:
        """The same part of another view of the whole store."""
        raise NotImplementedError

    def _part(self, whole: AttemptReader) -> AttemptReader:
        """A reader of the part, from that of the whole slide."""
        raise NotImplementedError

    def _reader(self, slide_id: str) -> AttemptReader:
        reader = self._readers.get(slide_id)
        if reader is None:
            reader = self._readers[slide_id] = self._part(self.whole._reader(slide_id))
        return reader

    def writer(
        self,
        slide_id: str,
        num_tiles: int,
        attrs: dict[str, Any],
        coarser: Sequence[tuple[int, dict[str, Any]]] = (),
    ) -> SlideWriter:
        """Always refused.

        Raises:
            StoreError: Slides are written whole.
        """
        raise StoreError(
            f"slide {slide_id!r} would be written to a part of the store",
            "Write through the store itself, all scales and views at once.",
        )

    def verify(self, slide_ids: Iterable[str] | None = None) -> Iterator[Finding]:
        """Of whole slides."""
        return self.whole.verify(slide_ids)

    def drop(self, slide_id: str) -> None:
        """Drop the whole slide."""
        self._readers.pop(slide_id, None)
        self.whole.drop(slide_id)
