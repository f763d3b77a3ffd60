"""Read, check and remove committed slides of a store."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import StoreError
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.commit import other_config, read_record
from hmil_fast.io.store.layout import (
    COMMIT_FILE,
    SLIDES,
    aside_name,
    slide_dirname,
    slide_id_of,
)
from hmil_fast.io.store.location import Location
from hmil_fast.io.store.reader import AttemptReader
from hmil_fast.io.store.schema import SlideRecord, StoreSpec
from hmil_fast.io.store.sweep import sweep
from hmil_fast.io.store.verify import Finding, findings
from hmil_fast.io.store.writer import SlideWriter


class FeatureStore:
    """Committed slides of one encoder and tiling; get one from create_store or open_store.

    Reading is safe from many threads and processes, and during writes by others. Records are
    kept in memory once read: a committed slide never changes.

    Attributes:
        unnamed: Folders ("slides/…") of slides whose ids only the commit knows, which the last
            `slide_ids` could not read. They stand in place of an id in `verify`, `drop` and
            `set_aside`.
    """

    def __init__(self, path: Location, spec: StoreSpec, store_uuid: str) -> None:
        self.path = path
        self._backend = backend_of(path)
        self.spec = spec
        self.uuid = store_uuid
        self._readers: dict[str, AttemptReader] = {}
        self.unnamed: frozenset[str] = frozenset()

    def _slide_dir(self, slide_id: str) -> Location:
        if slide_id in self.unnamed:
            return self.path / slide_id
        return self.path / SLIDES / slide_dirname(slide_id)

    def slide_ids(self) -> list[str]:
        """Ids of the committed slides, sorted; those of `unnamed` are not among them."""
        found, unnamed = [], set()
        for name in self._backend.folders_with(self.path / SLIDES, COMMIT_FILE):
            slide_id = slide_id_of(name)
            if slide_id is None:
                try:
                    record = read_record(self.path / SLIDES / name)
                except StoreError:
                    unnamed.add(f"{SLIDES}/{name}")
                    continue
                slide_id = record.slide_id if record else ""
            if slide_id and slide_dirname(slide_id) == name:
                found.append(slide_id)
        self.unnamed = frozenset(unnamed.difference(found))
        return sorted(found)

    def _everything(self) -> list[str]:
        ids = self.slide_ids()
        return [*ids, *sorted(self.unnamed)]

    def _reader(self, slide_id: str) -> AttemptReader:
        reader = self._readers.get(slide_id)
        if reader is None:
            slide_dir = self._slide_dir(slide_id)
            record = read_record(slide_dir)
            if record is None:
                raise StoreError(
                    f"slide {slide_id!r} is not in the store {self.path}",
                    "Extract it first; `hmil-fast store info` tells what is there.",
                )
            if record.config_hash != self.spec.config_hash:
                raise other_config(slide_id, record, self.spec.config_hash, slide_dir)
            expected = (slide_id, self.spec.dim, self.spec.dtype)
            if (record.slide_id, record.dim, record.dtype) != expected:
                raise StoreError(
                    f"{slide_dir / COMMIT_FILE} is of slide {record.slide_id!r}, "
                    f"dim {record.dim}, {record.dtype}, not of {slide_id!r}",
                    "Put each slide's folder back under its own name, or run `hmil-fast store drop "
                    f"{self.path}` with this slide's id, and extract it again.",
                )
            reader = AttemptReader(slide_dir / record.attempt, record)
            self._readers[slide_id] = reader
        return reader

    def record(self, slide_id: str) -> SlideRecord:
        """The slide's commit record.

        Raises:
            StoreError: not in the store, malformed, or of another configuration.
        """
        return self._reader(slide_id).record

    def records(self) -> dict[str, SlideRecord | StoreError]:
        """Commit records by slide id, or why one cannot be read; then those of `unnamed`."""

        def look(slide_id: str) -> SlideRecord | StoreError:
            try:
                return self.record(slide_id)
            except StoreError as error:
                return error

        names = self._everything()
        return dict(zip(names, self._backend.map(look, names), strict=True))

    def is_done(self, slide_id: str) -> bool:
        """Whether the slide is committed with this store's configuration.

        Raises:
            StoreError: it is committed with another configuration, or its commit is malformed.
        """
        if not self._backend.exists(self._slide_dir(slide_id) / COMMIT_FILE):
            return False
        self._reader(slide_id)
        return True

    def writer(
        self,
        slide_id: str,
        num_tiles: int,
        attrs: dict[str, Any],
        coarser: Sequence[tuple[int, dict[str, Any]]] = (),
    ) -> SlideWriter:
        """A writer for one slide; ask is_done first. See SlideWriter.

        Raises:
            StoreError: as is_done, or a bad argument, or the disk refuses.
        """
        self.is_done(slide_id)
        return SlideWriter(self.path, self.spec, slide_id, num_tiles, attrs, coarser=coarser)

    def features(self, slide_id: str, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Features [N, D], in `out` (C-contiguous, same shape and dtype) if given.

        Raises:
            StoreError: not in the store, or damaged: every checksum is verified.
        """
        return self.read_packed([slide_id], self._exact(slide_id, out), threads=1)[0]

    def _exact(self, slide_id: str, out: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
        wanted = (self.record(slide_id).num_tiles, self.spec.dim)
        if out is not None and out.shape != wanted:
            raise StoreError(
                f"out is {out.shape}, slide {slide_id!r} is {wanted}", "Give an array of that size."
            )
        return out

    def coords(self, slide_id: str) -> npt.NDArray[np.int32]:
        """Top-left corners [N, 2] (x, y) in level-0 px."""
        return self._reader(slide_id).coords()

    def status(self, slide_id: str) -> npt.NDArray[np.uint8]:
        """Status [N] of each tile; 0 is good, features of the others are zeros."""
        return self._reader(slide_id).status()

    def parent(self, slide_id: str) -> npt.NDArray[np.int32]:
        """Row [N] of the tile of the next coarser scale that each tile's centre lies in.

        Raises:
            StoreError: There is no coarser scale, or the slide is damaged.
        """
        return self._reader(slide_id).parent()

    def file(self, slide_id: str, name: str) -> bytes | None:
        """An extra file's bytes; None when the slide has none of that name."""
        reader = self._reader(slide_id)
        if not any(o.key == f"files/{name}/zarr.json" for o in reader.record.objects):
            return None
        return reader.read(f"files/{name}").tobytes()

    def read_rows(self, slide_id: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Features of the tiles from `start` to before `stop`, [n, D], in a new array.

        Whole chunks of the file are read and their checksums verified: bounds that are multiples
        of `chunk_rows` waste nothing.

        Raises:
            StoreError: not in the store, damaged, or it has no such tiles.
        """
        reader = self._features(slide_id)
        if not 0 <= start <= stop <= reader.record.num_tiles:
            raise StoreError(
                f"slide {slide_id!r} has {reader.record.num_tiles} tiles, not {start} to {stop}",
                "Give 0 ≤ start ≤ stop ≤ the number of tiles.",
            )
        return reader.read_rows(reader.features, start, stop)

    def chunk_rows(self, slide_id: str) -> int:
        """Tiles in a chunk of the slide's features, the least that is read."""
        return self._features(slide_id).features_layout().chunk

    def _features(self, slide_id: str) -> AttemptReader:
        reader = self._reader(slide_id)
        if reader.features_layout().dtype != self.spec.stored_dtype:
            raise reader.damaged(f"features are {reader.features_layout().dtype}")
        return reader

    def read_packed(
        self,
        slide_ids: Sequence[str],
        out: npt.NDArray[Any] | None = None,
        threads: int = 4,
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Read bags one after the other into one array.

        Args:
            slide_ids: Committed slides; one may come twice.
            out: C-contiguous [≥ ΣN, D] of the stored dtype, such as pinned memory.
            threads: Shards read at once.

        Returns:
            x [ΣN, D] (a view of `out` if given) and bags int64 [B, 2] of (start, length).

        Raises:
            StoreError: a slide is missing or damaged, or `out` does not fit.
        """
        readers = [self._features(slide_id) for slide_id in slide_ids]
        lengths = np.array([reader.record.num_tiles for reader in readers], np.int64)
        bags = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
        total = int(lengths.sum())
        if out is None:
            out = np.empty((total, self.spec.dim), self.spec.stored_dtype)
        fits = out.ndim == 2 and out.shape[1] == self.spec.dim and len(out) >= total
        usable = out.flags.c_contiguous and out.flags.writeable
        if not (fits and usable and out.dtype == self.spec.stored_dtype):
            raise StoreError(
                f"out is {out.dtype} {out.shape}; needed are {total} rows of {self.spec.dim}",
                f"Give a C-contiguous writable {self.spec.stored_dtype.name} array of that size.",
            )
        work = [
            task
            for slide_id, (start, length) in zip(slide_ids, bags.tolist(), strict=True)
            for task in self._work(slide_id, out[start : start + length])
        ]
        if threads > 1 and len(work) > 1:
            with ThreadPoolExecutor(min(threads, len(work))) as pool:
                for done in [pool.submit(task) for task in work]:
                    done.result()
        else:
            for task in work:
                task()
        return out[:total], bags

    def _work(self, slide_id: str, out: npt.NDArray[Any]) -> Iterator[Callable[[], None]]:
        """The reads that fill `out` with a slide's features."""
        reader = self._features(slide_id)
        return reader.work(reader.features, out)

    def verify(self, slide_ids: Iterable[str] | None = None) -> Iterator[Finding]:
        """Check sizes, existence, every checksum, content digest and finite features.

        Yields:
            One finding per slide, in order; damage is reported, never raised.
        """

        def slides() -> Iterator[tuple[str, Location, SlideRecord | StoreError]]:
            for slide_id in self._everything() if slide_ids is None else slide_ids:
                self._readers.pop(slide_id, None)
                try:
                    reader = self._reader(slide_id)
                except StoreError as error:
                    yield slide_id, self.path, error
                else:
                    yield slide_id, reader.folder, reader.record

        return findings(slides())

    def drop(self, slide_id: str) -> None:
        """Unpublish a slide and delete its files, so that it can be extracted again.

        The files of a slide whose commit is damaged are left to sweep.

        Raises:
            StoreError: the slide's folder is a link, or the disk refuses.
        """
        with self._dropping(slide_id) as slide_dir:
            record = None
            with suppress(StoreError):
                record = read_record(slide_dir)
            self._backend.remove(slide_dir / COMMIT_FILE)
            if record:
                self._backend.remove(slide_dir / record.attempt)

    def set_aside(self, slide_id: str) -> None:
        """Unpublish a slide, so that it can be extracted again; sweep deletes its files later.

        Its commit gets another name beside it: to undo this, give it back its own.

        Raises:
            StoreError: as `drop`.
        """
        with self._dropping(slide_id) as slide_dir:
            self._backend.rename(slide_dir / COMMIT_FILE, aside_name(COMMIT_FILE))

    @contextmanager
    def _dropping(self, slide_id: str) -> Iterator[Location]:
        slide_dir = self._slide_dir(slide_id)
        self._readers.pop(slide_id, None)
        if self._backend.is_link(slide_dir):
            raise StoreError(
                f"{slide_dir} is a link: nothing outside the store is changed",
                "Remove the link, then extract this slide again.",
            )
        try:
            yield slide_dir
        except OSError as error:
            raise self._backend.failed(error, f"dropping slide {slide_id!r}", slide_dir) from error

    def sweep(self, older_than_s: float, delete: bool = False) -> list[Location]:
        """Attempts that no commit names, untouched for `older_than_s` seconds.

        Writers touch their attempt with every append; give more than the longest pause between
        two (an hour is safe).

        Args:
            older_than_s: Least age in seconds.
            delete: Delete them too; otherwise only list.

        Raises:
            StoreError: something cannot be deleted.
        """
        return sweep(self.path, older_than_s, delete=delete)[0]

    def info(self) -> dict[str, Any]:
        """Counts and settings: slides, tiles, bytes, dim, dtype, encoder, tiling, uuid, path.

        Where there are several scales, `tiles` are those of all and `scales` tells them apart;
        `views` are those of every tile beside the plain one. Slides of which `problems` tells why
        their commit cannot be read count in nothing.
        """
        found = self.records()
        records = [record for record in found.values() if isinstance(record, SlideRecord)]
        problems = {
            name: error.what for name, error in found.items() if isinstance(error, StoreError)
        }
        counts = [[r.num_tiles, *(scale.num_tiles for scale in r.scales)] for r in records]
        scales = [
            {"mpp": mpp, "tiles": sum(count[i] for count in counts)}
            for i, mpp in enumerate(self.spec.scales)
        ]
        return {
            "path": str(self.path),
            "uuid": self.uuid,
            "slides": len(records),
            "tiles": sum(map(sum, counts)),
            "bytes": sum(record.bytes for record in records),
            **({"problems": problems} if problems else {}),
            **({"scales": scales} if len(scales) > 1 else {}),
            **({"views": self.spec.views} if self.spec.views else {}),
            **asdict(self.spec),
        }
