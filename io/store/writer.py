"""Write one slide: an attempt of its own in whole shards, then the commit."""

import json
import operator
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import StoreError
from hmil_fast.io.store import local
from hmil_fast.io.store.arrays import Group
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.commit import publish, read_record, scan
from hmil_fast.io.store.layout import (
    FILE_NAME,
    MAX_FILE_BYTES,
    MAX_SHARD_BYTES,
    MAX_SHARD_ROWS,
    MAX_TILES,
    SCHEMA_VERSION,
    SLIDES,
    slide_dirname,
)
from hmil_fast.io.store.location import Location
from hmil_fast.io.store.reader import AttemptReader
from hmil_fast.io.store.rows import FeatureRows
from hmil_fast.io.store.schema import (
    ScaleRecord,
    SlideRecord,
    StoredObject,
    StoreSpec,
    canonical_json,
    features_name,
    scale_prefix,
)

_COUNTS = ("appended", "num_tiles")


class SlideWriter:
    """Takes a slide's rows in order and commits them all at once; use it in a `with` block.

    Leaving the block without `commit` deletes everything written. Memory: one shard a scale and
    view (those of all views together ≤ 256 MiB), twice that again while it is written.

    Args:
        store: The store's folder, or its URL.
        spec: What the store's slides share.
        slide_id: Any text that is not empty.
        num_tiles: N, rows that will be appended; 0 is a slide without tissue.
        attrs: Facts about the slide (mpp, level, slide size); strict JSON.
        most_shard_rows: Upper bound on the rows of a shard.
        coarser: Where the store has several scales, rows and facts of each but the finest, which
            `num_tiles` and `attrs` are of.

    Raises:
        StoreError: a bad argument, or the disk refuses.
    """

    def __init__(
        self,
        store: Location,
        spec: StoreSpec,
        slide_id: str,
        num_tiles: int,
        attrs: dict[str, Any],
        most_shard_rows: int = MAX_SHARD_ROWS,
        coarser: Sequence[tuple[int, dict[str, Any]]] = (),
    ) -> None:
        self.slide_id = slide_id
        tiles = [operator.index(n) for n in (num_tiles, *(count for count, _ in coarser))]
        for n in tiles:
            if not 0 <= n <= MAX_TILES:
                raise self._misuse(f"num_tiles is {n}", f"Give 0 to {MAX_TILES:,}.")
        if len(tiles) != len(spec.scales):
            raise self._misuse(
                f"rows of {len(tiles)} scales, the store has {len(spec.scales)}",
                "Give the rows and facts of every scale of the store, or another --store.",
            )
        self.spec = spec
        self.attrs, *self._coarser = (
            json.loads(canonical_json(about, f"attrs of slide {slide_id!r}"))
            for about in (attrs, *(about for _, about in coarser))
        )
        self._slide_dir = store / SLIDES / slide_dirname(slide_id)
        self._attempt = self._slide_dir / f"a-{uuid.uuid4().hex}.zarr"
        self._prefixes = ["", *(scale_prefix(float(mpp or 0)) for mpp in spec.scales[1:])]
        self._backend = backend_of(self._attempt)
        self._folder = self._backend.staging(self._attempt)
        self._open = True
        try:
            self._backend.make_staging(self._attempt)
            self._group = self._create()
            if spec.views:
                most = MAX_SHARD_BYTES // (spec.row_bytes * (1 + spec.views))
                most_shard_rows = min(most_shard_rows, most)
            self._rows, *self._views = (
                [
                    FeatureRows(self._group, prefix + features_name(view), n, spec, most_shard_rows)
                    for prefix, n in zip(self._prefixes, tiles, strict=True)
                ]
                for view in range(1 + spec.views)
            )
        except OSError as error:
            raise self._fail(error, "starting") from error

    def _create(self) -> Group:
        about = {
            "schema_version": SCHEMA_VERSION,
            "slide_id": self.slide_id,
            "encoder": self.spec.encoder,
            "tiling": self.spec.tiling,
            "coords_convention": "level-0 pixels, top-left corner, x y",
            "slide": self.attrs,
        }
        if self._coarser:
            about["coarser"] = {
                prefix.rstrip("/"): attrs
                for prefix, attrs in zip(self._prefixes[1:], self._coarser, strict=True)
            }
        return Group(self._folder, about)

    def append(self, features: npt.NDArray[Any], scale: int = 0, view: int = 0) -> None:
        """Add rows; any number of them at a time.

        Args:
            features: [n, D] in the store's dtype (bfloat16 as its bits in uint16). Copied.
            scale: Which scale they are of, 0 being the finest.
            view: Which view they are of, 0 being the tiles as they are.

        Raises:
            StoreError: wrong shape or dtype, more rows than num_tiles, or the disk refuses.
        """
        self._check_open()
        if features.ndim != 2 or features.shape[1] != self.spec.dim:
            raise self._misuse(
                f"features of shape {features.shape} in a store of dim {self.spec.dim}",
                "Append arrays of shape [n, D] from the encoder that this store was made for.",
            )
        if features.dtype != self.spec.stored_dtype:
            raise self._misuse(
                f"features are {features.dtype}, the store holds {self.spec.dtype}",
                f"Convert them to {self.spec.stored_dtype.name} before appending.",
            )
        rows = (self._rows, *self._views)[view][scale]
        if rows.appended + len(features) > rows.num_tiles:
            raise self._misuse(
                f"{rows.appended + len(features)} rows appended of {rows.num_tiles} announced",
                "Announce the true number of tiles to writer().",
            )
        try:
            local.touch(self._folder)
            rows.append(features)
        except OSError as error:
            raise self._fail(error, "writing") from error

    def commit(
        self,
        coords: npt.NDArray[Any],
        status: npt.NDArray[Any],
        files: dict[str, bytes] | None = None,
        parent: npt.NDArray[Any] | None = None,
    ) -> SlideRecord:
        """Make the slide exist, all of it or nothing.

        Arrays are over the rows of all scales, one scale after the other, the finest first.

        Args:
            coords: [N, 2] integers, top-left corners (x, y) in level-0 px.
            status: [N] integers 0 to 255; 0 is good. Features of other rows are stored as zeros.
            files: Small extra files by name, such as {"thumbnail.jpg": …}, ≤ 64 MiB each.
            parent: [N less the coarsest scale's] row, counted in its own scale, of the tile of the
                next coarser one that each tile lies in; only where there are several scales.

        Returns:
            The slide's record. When another writer was first with the same configuration this
            is its record, and ours is deleted.

        Raises:
            StoreError: rows are missing or not finite, another configuration was first, or the
                disk refuses. The attempt is deleted.
        """
        self._check_open()
        try:
            appended, n = (sum(getattr(rows, what) for rows in self._rows) for what in _COUNTS)
            if appended != n:
                raise self._misuse(f"{appended} rows appended of {n}", "Append every row.")
            for k, view in enumerate(self._views, 1):
                if (there := sum(rows.appended for rows in view)) != n:
                    raise self._misuse(f"{there} rows of view {k} of {n}", "Append every view.")
            small = {
                "coords": self._integers("coords", coords, (n, 2), np.dtype(np.int32)),
                "status": self._integers("status", status, (n,), np.dtype(np.uint8)),
            }
            if self._coarser:
                given = np.empty(0) if parent is None else parent
                inner = (n - self._rows[-1].num_tiles,)
                small["parent"] = self._integers("parent", given, inner, np.dtype(np.int32))
                self._check_parents(small["parent"])
            self._write_rest(small, files or {})
            return self._publish()
        except OSError as error:
            raise self._fail(error, "committing") from error
        except BaseException:
            self.abort()
            raise

    def _check_parents(self, parent: npt.NDArray[np.int32]) -> None:
        counts = [rows.num_tiles for rows in self._rows]
        most = np.repeat(counts[1:], counts[:-1])
        if not ((parent >= 0) & (parent < most)).all():
            raise self._misuse("parent names rows that do not exist", "Give the parents' rows.")

    def _integers(
        self, name: str, array: npt.NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> npt.NDArray[Any]:
        good = array.shape == shape and (array.dtype.kind in "iu" or not array.size)
        if good and array.size:
            limits = np.iinfo(dtype)
            good = int(array.min()) >= limits.min and int(array.max()) <= limits.max
        if not good:
            raise self._misuse(
                f"{name} are {array.dtype} of shape {array.shape}",
                f"Give {dtype.name} of shape {shape}.",
            )
        return np.ascontiguousarray(array, dtype)

    def _write_rest(self, small: dict[str, npt.NDArray[Any]], files: dict[str, bytes]) -> None:
        local.touch(self._folder)
        extra: dict[str, npt.NDArray[Any]] = {}
        start = 0
        for prefix, *views in zip(self._prefixes, self._rows, *self._views, strict=True):
            stop = start + views[0].num_tiles
            bad = np.flatnonzero(small["status"][start:stop])
            for rows in views:
                rows.finish(bad)
            last = prefix == self._prefixes[-1]
            for name, values in small.items():
                if not (last and name == "parent"):
                    extra[f"{prefix}{name}"] = values[start:stop]
            start = stop
        for name, data in files.items():
            if not FILE_NAME.fullmatch(name) or len(data) > MAX_FILE_BYTES:
                raise self._misuse(
                    f"extra file {name!r} of {len(data):,} bytes",
                    "Name it with letters, digits, '.', '_' or '-', and keep it under 64 MiB.",
                )
            extra[f"files/{name}"] = np.frombuffer(data, np.uint8)
        for name, array in extra.items():
            self._group.small(name, array)

    def _publish(self) -> SlideRecord:
        disk = backend_of(self._folder)
        sizes = disk.tree(self._folder)
        record = SlideRecord(
            slide_id=self.slide_id,
            num_tiles=self._rows[0].num_tiles,
            dim=self.spec.dim,
            dtype=self.spec.dtype,
            attempt=self._attempt.name,
            objects=tuple(
                StoredObject(key, size, disk.crc32c_of(self._folder / key))
                for key, size in sorted(sizes.items())
            ),
            attrs=self.attrs,
            config_hash=self.spec.config_hash,
            content_digest="",
            created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            scales=tuple(
                ScaleRecord(float(mpp or 0), rows.num_tiles, attrs, "")
                for mpp, rows, attrs in zip(
                    self.spec.scales[1:], self._rows[1:], self._coarser, strict=True
                )
            ),
        )
        (digest, features), *others = (self._digests(record, i) for i in range(len(self._rows)))
        scales = zip(record.scales, others, strict=True)
        record = replace(
            record,
            content_digest=digest,
            features_digest=features,
            scales=tuple(replace(scale, content_digest=found) for scale, (found, _) in scales),
        )
        self._backend.finish(self._attempt)
        self._open = False
        return publish(self._slide_dir, record)

    def _digests(self, record: SlideRecord, scale: int) -> tuple[str, str]:
        digest, features, bad = scan(
            AttemptReader(self._folder, record.at(scale), self._prefixes[scale])
        )
        if len(bad):
            raise self._misuse(
                f"features of row {bad[0]} are not finite ({len(bad)} such rows, status 0)",
                "Look for overflow in the encoder's dtype, or give these rows a status.",
            )
        return digest, features

    def abort(self) -> None:
        """Delete what was written, unless it was committed."""
        self._open = False
        found = None
        with suppress(StoreError):  # a damaged commit is not ours
            found = read_record(self._slide_dir)
        if found is None or found.attempt != self._attempt.name:
            with suppress(OSError):
                self._backend.discard(self._attempt)

    def _check_open(self) -> None:
        if not self._open:
            raise self._misuse("its writer is closed", "Ask for a new writer.")

    def _fail(self, error: OSError, doing: str) -> StoreError:
        explained = self._backend.failed(error, f"{doing} slide {self.slide_id!r}", self._attempt)
        self.abort()
        return explained

    def _misuse(self, what: str, fix: str) -> StoreError:
        return StoreError(f"slide {self.slide_id!r}: {what}", fix)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open:
            self.abort()
