"""Publish a slide by creating its commit record exclusively; read records, scan stored rows.

A process may die at any step: before the record exists nothing does, after it the slide is whole.
Of two writers one wins; the other deletes its own attempt.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hmil_fast.errors import StoreError
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.layout import COMMIT_FILE, MAX_FILE_BYTES
from hmil_fast.io.store.location import Location
from hmil_fast.io.store.reader import AttemptReader
from hmil_fast.io.store.schema import SlideRecord, canonical_json, parse_record

_EXPONENT = {"float16": 0x7C00, "float32": 0x7F80_0000, "bfloat16": 0x7F80}
_VALUES_AT_ONCE = 2**21


def read_record(slide_dir: Location) -> SlideRecord | None:
    """The slide's commit; None when there is none.

    Raises:
        StoreError: the commit is malformed.
    """
    path = slide_dir / COMMIT_FILE
    try:
        return parse_record(backend_of(path).read_bytes(path, MAX_FILE_BYTES), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise backend_of(path).failed(error, "reading the commit", path) from error


def publish(slide_dir: Location, record: SlideRecord) -> SlideRecord:
    """Make the slide exist; returns the winner's record, which may be another writer's.

    Raises:
        StoreError: another writer committed this slide with another configuration, or the
            attempt was swept away before it could be committed.
    """
    path = slide_dir / COMMIT_FILE
    attempt = slide_dir / record.attempt
    backend = backend_of(path)
    if backend.create_exclusive(path, record.to_json().encode()):
        if backend.tree(attempt) == {stored.key: stored.bytes for stored in record.objects}:
            return record
        backend.unlink(path)
        raise StoreError(
            f"slide {record.slide_id!r}: files of {attempt} vanished while it was committed",
            "Extract this slide again; run `store sweep` only on attempts older than any job.",
        )
    winner = read_record(slide_dir)
    backend.remove(attempt)
    if winner is None or winner.config_hash != record.config_hash:
        raise other_config(record.slide_id, winner, record.config_hash, slide_dir)
    return winner


def other_config(
    slide_id: str, found: SlideRecord | None, wanted: str, slide_dir: Location
) -> StoreError:
    """The error for a slide that was committed under another encoder or tiling."""
    theirs = "nothing" if found is None else found.config_hash
    return StoreError(
        f"slide {slide_id!r} was committed with configuration {theirs}, this store's is {wanted} "
        f"({slide_dir})",
        f"Run `hmil-fast store verify {slide_dir.parent.parent}`: it says whether store.json is "
        "damaged. If not, write to a new --store, or `hmil-fast store drop` the slide.",
    )


def nonfinite_rows(features: npt.NDArray[np.generic], dtype: str) -> npt.NDArray[np.int64]:
    """Rows with NaN or infinity in features [n, D] of the logical dtype; works on bits."""
    bits = features.view(f"u{features.dtype.itemsize}")
    mask = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    bad = np.zeros(len(bits), bool)
    step = max(1, _VALUES_AT_ONCE // bits.shape[1])
    for start in range(0, len(bits), step):
        rows = slice(start, start + step)
        bad[rows] = (bits[rows] & mask).max(axis=1) >= _EXPONENT[dtype]
    return np.flatnonzero(bad)


def scan(reader: AttemptReader) -> tuple[str, str, npt.NDArray[np.int64]]:
    """Read every row back, a block at a time.

    Returns:
        The content digest over (dtype, shape, features, coords, status) and the features of
        further views, that over (dtype, shape, features, status) alone, and the rows that are not
        finite in a view although their status is 0.

    Raises:
        StoreError: a file is missing, truncated or fails its checksum.
    """
    record = reader.record
    status = reader.status()
    header = {"dtype": record.dtype, "shape": [record.num_tiles, record.dim]}
    digest = hashlib.sha256(canonical_json(header, "header").encode())
    bad = [_scan_features(reader, digest.update)]
    plain = digest.copy()
    plain.update(status.data)
    digest.update(reader.coords().data)
    digest.update(status.data)
    bad += [_scan_features(view, digest.update) for view in reader.views()]
    rows = np.unique(np.concatenate(bad))
    bad_rows = rows[status[rows] == 0]
    return f"sha256:{digest.hexdigest()}", f"sha256:{plain.hexdigest()}", bad_rows


def _scan_features(
    reader: AttemptReader, update: Callable[[memoryview], None]
) -> npt.NDArray[np.int64]:
    """Rows of one view that are not finite."""
    record, layout = reader.record, reader.features_layout()
    buffer = np.empty((min(layout.block, record.num_tiles), record.dim), layout.dtype)
    bad = [np.empty(0, np.int64)]
    for block in range(layout.blocks):
        rows = layout.rows(block)
        features = buffer[: rows.stop - rows.start]
        reader.read_block(reader.features, block, features)
        update(features.data)
        bad.append(nonfinite_rows(features, record.dtype) + rows.start)
    return np.concatenate(bad)
