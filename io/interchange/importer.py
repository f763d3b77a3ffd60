"""Import one file of features into a store: check it, compare it with the store, commit it."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import HmilError, SlideError, UsageError
from hmil_fast.io.interchange.bag import Bag, Hints
from hmil_fast.io.interchange.formats import Format
from hmil_fast.io.store import FeatureStore, StoreSpec
from hmil_fast.io.store.commit import nonfinite_rows
from hmil_fast.io.store.layout import STORED_AS

# as a tile that could not be decoded: the row stays, training leaves it out
NOT_FINITE = 100
_SAMPLE = 32


@dataclass(frozen=True)
class Taken:
    """What became of one file.

    Attributes:
        tiles: Rows.
        before: It was in the store already.
        notes: What the person should know.
    """

    tiles: int
    before: bool
    notes: tuple[str, ...]


def likely_spec(files: Iterable[tuple[str, Path]], form: Format, hints: Hints) -> StoreSpec:
    """What most of the first files hold, so that one odd file first does not decide the store.

    Raises:
        SlideError: no file can be read; this is the first one's error.
        UsageError: none has tiles.
    """
    specs: Counter[str] = Counter()
    by_hash: dict[str, StoreSpec] = {}
    first: HmilError | None = None
    for slide_id, path in files:
        try:
            with form.read(path, slide_id, hints) as bag:
                spec = _spec(form.name, bag) if bag.shape[0] else None
        except HmilError as error:
            first = first or error
            continue
        if spec is not None:
            specs[spec.config_hash] += 1
            by_hash[spec.config_hash] = spec
        if specs.total() == _SAMPLE:
            break
    if not specs:
        raise first or UsageError("no slide of these has tiles", "Import some that have.")
    return by_hash[specs.most_common(1)[0][0]]


def _spec(source: str, bag: Bag) -> StoreSpec:
    encoder = {"name": bag.encoder or "unknown", "dim": bag.shape[1], "imported_from": source}
    return StoreSpec(bag.shape[1], bag.dtype, encoder, {"imported_from": source} | bag.tiling)


def import_file(
    store: FeatureStore, form: Format, slide_id: str, path: Path, hints: Hints
) -> Taken:
    """Commit one file's features, or find them committed.

    Raises:
        SlideError: the file is damaged, of another kind than the store, or the store holds this
            slide with other content.
        StoreError: the store refuses.
    """
    with form.read(path, slide_id, hints) as found:
        bag = found if found.shape[0] else _without_tiles(found, store.spec)
        _check(store, _spec(form.name, bag), path)
        rows = _Rows(bag)
        coords = bag.coords
        if coords is None:
            coords = np.full((bag.shape[0], 2), -1, np.int64)
        before = store.is_done(slide_id)
        if before:
            if not _equal(store, slide_id, rows, coords):
                raise SlideError(
                    f"slide {slide_id!r} is in the store with other content than {path}",
                    f"Import into a new store, or run `hmil-fast store drop {store.path} "
                    f"{slide_id}` first.",
                )
        else:
            source = {"file": path.name, "bytes": path.stat().st_size}
            with store.writer(slide_id, bag.shape[0], bag.attrs | {"source": source}) as writer:
                for block in rows:
                    writer.append(block)
                writer.commit(coords, rows.status)
    return Taken(bag.shape[0], before, (*bag.notes, *rows.notes()))


def _without_tiles(bag: Bag, spec: StoreSpec) -> Bag:
    """A slide without tiles fits any dtype, and any length where nobody stated one."""
    shape = (0, bag.shape[1] or spec.dim)
    empty = np.empty(shape, STORED_AS[spec.dtype])
    return replace(bag, shape=shape, dtype=spec.dtype, read=lambda start, stop: empty)


def _check(store: FeatureStore, spec: StoreSpec, path: Path) -> None:
    def flat(of: StoreSpec) -> dict[str, Any]:
        plain = {"dim": of.dim, "dtype": of.dtype}
        plain |= {f"encoder {key}": value for key, value in of.encoder.items()}
        return plain | {f"tiling {key}": value for key, value in of.tiling.items()}

    ours, theirs = flat(store.spec), flat(spec)
    unlike = [
        f"{name} {theirs.get(name)!r} (the store: {ours.get(name)!r})"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if unlike:
        raise SlideError(
            f"{path} holds other features than the store {store.path}: {', '.join(unlike[:6])}",
            "Import it into a store of its own, or give the same --encoder and --dtype.",
        )


class _Rows:
    """A bag's rows as they are stored; what is odd about them is known once all were seen."""

    def __init__(self, bag: Bag) -> None:
        self._bag = bag
        self.status = np.zeros(bag.shape[0], np.uint8)
        self._zero = np.zeros(bag.shape[0], bool)

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        start = 0
        for block in self._bag.blocks():
            rows = slice(start, start + len(block))
            bad = nonfinite_rows(block, self._bag.dtype)
            self._zero[rows] = ~block.any(axis=1)
            if len(bad):
                block = block.copy()  # noqa: PLW2901  # it may be the file itself, mapped
                block[bad] = 0
                self.status[start + bad] = NOT_FINITE
            yield block
            start = rows.stop

    def notes(self) -> Iterator[str]:
        """Warnings."""
        if self.status.any():
            first = int(np.flatnonzero(self.status)[0])
            yield (
                f"{np.count_nonzero(self.status)} rows are not finite, such as row {first}: "
                "kept as bad tiles, without features"
            )
        if self._zero.any():
            edges = np.flatnonzero(np.diff(np.r_[False, self._zero, False].astype(np.int8)))
            runs = edges.reshape(-1, 2)
            start, stop = runs[np.argmax(runs[:, 1] - runs[:, 0])]
            yield (
                f"{np.count_nonzero(self._zero)} rows are all zeros, the longest run is rows "
                f"{start} to {stop - 1}: was it half written?"
            )


def _equal(store: FeatureStore, slide_id: str, rows: _Rows, coords: npt.NDArray[np.int64]) -> bool:
    """Whether the store holds these very rows, coordinates and statuses."""
    n = len(coords)
    if store.record(slide_id).num_tiles != n or not np.array_equal(store.coords(slide_id), coords):
        return False
    start = 0
    for block in rows:
        there = store.read_rows(slide_id, start, start + len(block))
        if not np.array_equal(there.view(np.uint8), block.view(np.uint8)):
            return False
        start += len(block)
    return np.array_equal(store.status(slide_id), rows.status)
