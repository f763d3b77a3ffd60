"""What store.json and commit.json hold, and the checks on reading them."""

import hashlib
import json
import operator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from hmil_fast.errors import StoreError
from hmil_fast.io.store.layout import (
    ATTEMPT_NAME,
    MAX_DIM,
    MAX_TILES,
    SCHEMA_VERSION,
    STORED_AS,
    safe_key,
)


def canonical_json(value: Any, name: str) -> str:
    """Strict JSON with sorted keys, for hashing and for the disk.

    Raises:
        StoreError: NaN, infinity, or something JSON has no word for; `name` says where.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{name} is not strict JSON: {error}",
            "Use text, finite numbers, true/false, null, lists and mappings; null instead of NaN.",
        ) from error


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object from a file's bytes.

    Raises:
        StoreError: not JSON, not an object, or NaN in it.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        value = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise malformed(path, str(error)) from error
    if not isinstance(value, dict):
        raise malformed(path, f"holds a {type(value).__name__}, not an object")
    return value


def malformed(path: Path, why: str) -> StoreError:
    """The error for a file of the store that does not say what it must."""
    return StoreError(
        f"{path} is malformed: {why}",
        "Restore this file from a backup, or run `hmil-fast store repair` and extract again.",
    )


def field(value: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    """value[key], which must be of the kind given (true is no number here)."""
    found = value.get(key)
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise malformed(path, f"field {key!r} is {found!r}"[:200])
    return found


def check_version(value: dict[str, Any], path: Path) -> None:
    """Refuse files that a newer release wrote.

    Raises:
        StoreError: the schema version is newer than this release knows, or missing.
    """
    version = field(value, "schema_version", int, path)
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema version {version}; this release reads up to {SCHEMA_VERSION}",
            "Install a newer hmil-fast.",
        )


@dataclass(frozen=True)
class StoreSpec:
    """What every slide of a store shares.

    Args:
        dim: Length D of a feature vector, 1 to 65,536.
        dtype: "float16", "float32" or "bfloat16". bfloat16 arrays go in and come out as their
            bits in uint16 (`tensor.view(torch.uint16).numpy()` and back, without a copy).
        encoder: Encoder card and sha256 of the weights; strict JSON.
        tiling: Tile size, mpp and what else decides which pixels a row stands for; strict JSON.

    Raises:
        StoreError: a field is out of range or not JSON.
    """

    dim: int
    dtype: str
    encoder: dict[str, Any]
    tiling: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", operator.index(self.dim))  # numpy's integers are not JSON
        if not 1 <= self.dim <= MAX_DIM:
            raise StoreError(f"dim is {self.dim}", f"Give a feature length of 1 to {MAX_DIM}.")
        if self.dtype not in STORED_AS:
            raise StoreError(
                f"dtype is {self.dtype!r}", f"Choose one of {', '.join(sorted(STORED_AS))}."
            )
        for name in ("encoder", "tiling"):
            # through JSON, so that a spec in memory equals the same spec read back
            plain = json.loads(canonical_json(getattr(self, name), name))
            if not isinstance(plain, dict):
                raise StoreError(f"{name} is a {type(plain).__name__}", "Give a mapping.")
            object.__setattr__(self, name, plain)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The numpy dtype of feature arrays: float16, float32, or uint16 for bfloat16."""
        return STORED_AS[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one feature vector."""
        return self.dim * self.stored_dtype.itemsize

    @property
    def config_hash(self) -> str:
        """First 32 hex digits of the sha256 over the spec as canonical JSON."""
        return hashlib.sha256(canonical_json(asdict(self), "spec").encode()).hexdigest()[:32]


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Where two specs part, as "tiling.mpp: 0.5 in the store, 1.0 asked for"."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            line
            for key in sorted(ours.keys() | theirs.keys())
            for line in differences(
                ours.get(key), theirs.get(key), f"{name}.{key}" if name else str(key)
            )
        ]
    if canonical_json(ours, name) == canonical_json(theirs, name):
        return []
    return [f"{name}: {ours!r} in the store, {theirs!r} asked for"]


@dataclass(frozen=True)
class StoredObject:
    """One file of an attempt: its key below the attempt's folder, size in bytes, crc32c."""

    key: str
    bytes: int
    crc32c: int


@dataclass(frozen=True)
class SlideRecord:
    """What commit.json says of a slide: it exists because this record does.

    `content_digest` is over the logical rows (features, coords, status), whatever the layout.
    """

    slide_id: str
    num_tiles: int
    dim: int
    dtype: str
    attempt: str
    objects: tuple[StoredObject, ...]
    attrs: dict[str, Any]
    config_hash: str
    content_digest: str
    created_utc: str

    @property
    def bytes(self) -> int:
        """Bytes on disk, without the record itself."""
        return sum(stored.bytes for stored in self.objects)

    def to_json(self) -> str:
        """The text of commit.json, with a checksum over itself."""
        value = asdict(self) | {"schema_version": SCHEMA_VERSION}
        return canonical_json(value | {"crc32c": _crc(value)}, "commit record")


def _crc(value: dict[str, Any]) -> int:
    return int(google_crc32c.value(canonical_json(value, "commit record").encode()))


def parse_record(data: bytes, path: Path) -> SlideRecord:
    """Read a commit.json, trusting nothing in it.

    Raises:
        StoreError: malformed, newer, out of bounds, or a key that leaves the attempt's folder.
    """
    value = parse_json(data, path)
    check_version(value, path)
    if value.pop("crc32c", None) != _crc(value):
        raise malformed(path, "its checksum is wrong")
    objects = []
    for item in field(value, "objects", list, path):
        if not isinstance(item, dict):
            raise malformed(path, "an entry of 'objects' is no mapping")
        stored = StoredObject(
            *(field(item, k, t, path) for k, t in (("key", str), ("bytes", int), ("crc32c", int)))
        )
        if not safe_key(stored.key) or stored.bytes < 0:
            raise malformed(path, f"object {stored.key!r} of {stored.bytes} bytes")
        objects.append(stored)
    record = SlideRecord(
        objects=tuple(objects),
        **{key: field(value, key, int, path) for key in ("num_tiles", "dim")},
        attrs=field(value, "attrs", dict, path),
        **{
            key: field(value, key, str, path)
            for key in (
                "slide_id",
                "dtype",
                "attempt",
                "config_hash",
                "content_digest",
                "created_utc",
            )
        },
    )
    if not ATTEMPT_NAME.fullmatch(record.attempt):
        raise malformed(path, f"attempt {record.attempt!r}"[:200])
    if not 0 <= record.num_tiles <= MAX_TILES or not 1 <= record.dim <= MAX_DIM:
        raise malformed(path, f"{record.num_tiles} tiles of {record.dim} values")
    return record
