"""Write one slide: an attempt of our own, in whole shards, then the commit."""

import json
import operator
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import StoreError
from hmil_fast.io.store import arrays, disk
from hmil_fast.io.store.commit import publish, read_record, scan
from hmil_fast.io.store.layout import (
    FILE_NAME,
    MAX_FILE_BYTES,
    MAX_SHARD_ROWS,
    MAX_TILES,
    SCHEMA_VERSION,
    SLIDES,
    shard_rows,
    slide_dirname,
)
from hmil_fast.io.store.reader import AttemptReader
from hmil_fast.io.store.schema import SlideRecord, StoredObject, StoreSpec, canonical_json


class SlideWriter:
    """Takes a slide's rows in order and commits them all at once; use it in a `with` block.

    Leaving the block without `commit` deletes everything written. Memory: one shard (≤ 256 MiB),
    twice that again while it is written.

    Args:
        store: The store's folder.
        spec: What the store's slides share.
        slide_id: Any text that is not empty.
        num_tiles: N, rows that will be appended; 0 is a slide without tissue.
        attrs: Facts about the slide (mpp, level, slide size); strict JSON.
        most_shard_rows: Upper bound on the rows of a shard.

    Raises:
        StoreError: a bad argument, or the disk refuses.
    """

    def __init__(
        self,
        store: Path,
        spec: StoreSpec,
        slide_id: str,
        num_tiles: int,
        attrs: dict[str, Any],
        most_shard_rows: int = MAX_SHARD_ROWS,
    ) -> None:
        self.slide_id = slide_id
        num_tiles = operator.index(num_tiles)
        if not 0 <= num_tiles <= MAX_TILES:
            raise self._misuse(f"num_tiles is {num_tiles}", f"Give 0 to {MAX_TILES:,}.")
        self.num_tiles = num_tiles
        self.spec = spec
        self.attrs = json.loads(canonical_json(attrs, f"attrs of slide {slide_id!r}"))
        self.appended = 0
        self._slide_dir = store / SLIDES / slide_dirname(slide_id)
        self._attempt = self._slide_dir / f"a-{uuid.uuid4().hex}.zarr"
        self._shard = shard_rows(num_tiles, spec.row_bytes, most_shard_rows)
        self._buffer = np.empty((min(self._shard, num_tiles), spec.dim), spec.stored_dtype)
        self._filled = 0
        self._open = True
        try:
            disk.make_folder(self._attempt)
            self._group, self._features = self._create()
        except OSError as error:
            raise self._fail(error, "starting") from error

    def _create(self) -> tuple[Any, Any]:
        about = {
            "schema_version": SCHEMA_VERSION,
            "slide_id": self.slide_id,
            "encoder": self.spec.encoder,
            "tiling": self.spec.tiling,
            "coords_convention": "level-0 pixels, top-left corner, x y",
            "slide": self.attrs,
        }
        group = arrays.create_group(self._attempt, about)
        features = arrays.create_features(group, self.num_tiles, self._shard, self.spec)
        return group, features

    def append(self, features: npt.NDArray[Any]) -> None:
        """Add rows; any number of them at a time.

        Args:
            features: [n, D] in the store's dtype (bfloat16 as its bits in uint16). Copied.

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
        if self.appended + len(features) > self.num_tiles:
            raise self._misuse(
                f"{self.appended + len(features)} rows appended of {self.num_tiles} announced",
                "Announce the true number of tiles to writer().",
            )
        try:
            disk.touch(self._attempt)
            done = 0
            while done < len(features):
                # a full shard waits for the next row: most slides then stay in memory until
                # commit, which may still have to blank some rows
                if self._filled == self._shard:
                    self._flush()
                take = min(self._shard - self._filled, len(features) - done)
                self._buffer[self._filled : self._filled + take] = features[done : done + take]
                self._filled += take
                self.appended += take
                done += take
        except OSError as error:
            raise self._fail(error, "writing") from error

    def _flush(self) -> None:
        start = self.appended - self._filled
        self._features[start : self.appended] = self._buffer[: self._filled]
        self._filled = 0

    def commit(
        self,
        coords: npt.NDArray[Any],
        status: npt.NDArray[Any],
        files: dict[str, bytes] | None = None,
    ) -> SlideRecord:
        """Make the slide exist, all of it or nothing.

        Args:
            coords: [N, 2] integers, top-left corners (x, y) in level-0 px.
            status: [N] integers 0 to 255; 0 is good. Features of other rows are stored as zeros.
            files: Small extra files by name, such as {"thumbnail.jpg": …}, ≤ 64 MiB each.

        Returns:
            The slide's record. When another writer was first with the same configuration this
            is its record, and ours is deleted.

        Raises:
            StoreError: rows are missing or not finite, another configuration was first, or the
                disk refuses. The attempt is deleted.
        """
        self._check_open()
        try:
            n = self.num_tiles
            if self.appended != n:
                raise self._misuse(f"{self.appended} rows appended of {n}", "Append every row.")
            self._write_rest(
                self._integers("coords", coords, (n, 2), np.dtype(np.int32)),
                self._integers("status", status, (n,), np.dtype(np.uint8)),
                files or {},
            )
            return self._publish()
        except OSError as error:
            raise self._fail(error, "committing") from error
        except BaseException:
            self.abort()
            raise

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

    def _write_rest(
        self,
        coords: npt.NDArray[np.int32],
        status: npt.NDArray[np.uint8],
        files: dict[str, bytes],
    ) -> None:
        disk.touch(self._attempt)
        bad = np.flatnonzero(status)
        start = self.appended - self._filled
        self._buffer[bad[bad >= start] - start] = 0
        if self._filled:
            self._flush()
        del self._buffer
        for block in np.unique(bad[bad < start] // self._shard):
            rows = slice(block * self._shard, (block + 1) * self._shard)
            features = self._features[rows]
            features[bad[bad // self._shard == block] - rows.start] = 0
            self._features[rows] = features
        extra: dict[str, npt.NDArray[Any]] = {"coords": coords, "status": status}
        for name, data in files.items():
            if not FILE_NAME.fullmatch(name) or len(data) > MAX_FILE_BYTES:
                raise self._misuse(
                    f"extra file {name!r} of {len(data):,} bytes",
                    "Name it with letters, digits, '.', '_' or '-', and keep it under 64 MiB.",
                )
            extra[f"files/{name}"] = np.frombuffer(data, np.uint8)
        for name, array in extra.items():
            arrays.create_small(self._group, name, array)

    def _publish(self) -> SlideRecord:
        disk.sync_tree(self._attempt)
        found = disk.objects(self._attempt)
        record = SlideRecord(
            slide_id=self.slide_id,
            num_tiles=self.num_tiles,
            dim=self.spec.dim,
            dtype=self.spec.dtype,
            attempt=self._attempt.name,
            objects=tuple(
                StoredObject(key, size, disk.crc32c_of(self._attempt / key))
                for key, size in sorted(found.items())
            ),
            attrs=self.attrs,
            config_hash=self.spec.config_hash,
            content_digest="",
            created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        digest, bad = scan(AttemptReader(self._attempt, record))
        if len(bad):
            raise self._misuse(
                f"features of row {bad[0]} are not finite ({len(bad)} such rows, status 0)",
                "Look for overflow in the encoder's dtype, or give these rows a status.",
            )
        disk.touch(self._attempt)
        disk.sync(self._slide_dir)
        disk.sync(self._slide_dir.parent)
        self._open = False
        return publish(self._slide_dir, replace(record, content_digest=digest))

    def abort(self) -> None:
        """Delete what was written, unless it was committed."""
        self._open = False
        found = None
        with suppress(StoreError):  # a damaged commit is not ours
            found = read_record(self._slide_dir)
        if found is None or found.attempt != self._attempt.name:
            with suppress(OSError):
                disk.remove(self._attempt)

    def _check_open(self) -> None:
        if not self._open:
            raise self._misuse("its writer is closed", "Ask for a new writer.")

    def _fail(self, error: OSError, doing: str) -> StoreError:
        explained = disk.failed(error, f"{doing} slide {self.slide_id!r}", self._attempt)
        # where one of zarr's parallel writes failed, the others may still be making folders
        for pause in (0.0, 0.05, 0.2):
            time.sleep(pause)
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
