"""Define the content of store.json and commit.json, and check it on reading."""

import hashlib
import json
import operator
from dataclasses import asdict, dataclass, replace
from typing import Any

import google_crc32c
import numpy as np

from hmil_fast.errors import DamagedError, StoreError
from hmil_fast.io.store.layout import (
    ATTEMPT_NAME,
    MAX_DIM,
    MAX_TILES,
    MAX_VIEWS,
    SCHEMA_VERSION,
    STORE_FILE,
    STORED_AS,
    safe_key,
)
from hmil_fast.io.store.location import Location


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


def parse_json(data: bytes, path: Location) -> dict[str, Any]:
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


def malformed(path: Location, why: str) -> DamagedError:
    """The error for store.json, or a file of a slide, that does not say what it must."""
    store = path.parent if path.name == STORE_FILE else path.parent.parent.parent
    return DamagedError(
        f"{path} is malformed: {why}",
        f"Run `hmil-fast store repair {store}`, or restore this file from a backup.",
    )


def field(value: dict[str, Any], key: str, kind: type, path: Location) -> Any:
    """value[key], which must be of the kind given (true is no number here)."""
    found = value.get(key)
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise malformed(path, f"field {key!r} is {found!r}"[:200])
    return found


def check_version(value: dict[str, Any], path: Location) -> None:
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
            `coarser` is a list of the mpp of further scales, `views.count` the number of
            augmented views of every tile beside the plain one, 0 to 64.

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
        coarser = self.tiling.get("coarser", [])
        if not isinstance(coarser, list) or not all(isinstance(m, float | int) for m in coarser):
            raise StoreError(f"tiling.coarser is {coarser!r}"[:200], "Give a list of mpp.")
        views = self.tiling.get("views", {"count": 0})
        count = views.get("count") if isinstance(views, dict) else None
        if not isinstance(count, int) or not 0 <= count <= MAX_VIEWS:
            raise StoreError(f"{count!r} views of every tile"[:200], f"Ask for 0 to {MAX_VIEWS}.")

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The numpy dtype of feature arrays: float16, float32, or uint16 for bfloat16."""
        return STORED_AS[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one feature vector."""
        return self.dim * self.stored_dtype.itemsize

    @property
    def scales(self) -> tuple[float | None, ...]:
        """µm per px of each scale, the finest first; None where nobody knows."""
        return (self.tiling.get("mpp"), *self.tiling.get("coarser", ()))

    @property
    def views(self) -> int:
        """Augmented views of every tile beside the plain one."""
        return int(self.tiling.get("views", {"count": 0})["count"])

    def at(self, scale: int) -> "StoreSpec":
        """What the slides share at one scale: for the finest, the spec of a store of it alone.

        Coarser ones have tiles that such a store would not have: those that finer tiles lie in.
        """
        tiling = {key: value for key, value in self.tiling.items() if key != "coarser"}
        if scale:
            tiling |= {"mpp": self.scales[scale], "around": self.scales[scale - 1]}
        return replace(self, tiling=tiling)

    @property
    def config_hash(self) -> str:
        """First 32 hex digits of the sha256 over the spec as canonical JSON."""
        return hashlib.sha256(canonical_json(asdict(self), "spec").encode()).hexdigest()[:32]


def differences(in_store: Any, wanted: Any, name: str = "") -> list[str]:
    """List where two specs differ, as "tiling.mpp: 0.5 in the store, 1.0 asked for".

    What only one of them has is named by the option of `extract` that makes it.
    """
    if isinstance(in_store, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted(in_store.keys() | wanted.keys())
            for line in differences(
                in_store.get(key), wanted.get(key), f"{name}.{key}" if name else str(key)
            )
        ]
    if canonical_json(in_store, name) == canonical_json(wanted, name):
        return []
    there, asked = (_option(name, value) for value in (in_store, wanted))
    return [f"{name}: {there} in the store, {asked} asked for"]


def _option(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name == "tiling.coarser":
        return " ".join(f"--mpp {mpp:g}" for mpp in value)
    if name == "tiling.views":
        return f"--views {value['count']}"
    if name == "tiling.stain_norm":
        return f"--stain-norm {value['method'] if isinstance(value, dict) else value}"
    return repr(value)


@dataclass(frozen=True)
class StoredObject:
    """One file of an attempt: its key below the attempt's folder, size in bytes, crc32c."""

    key: str
    bytes: int
    crc32c: int


@dataclass(frozen=True)
class ScaleRecord:
    """A coarser scale of a slide, its arrays below "mpp-…" in the attempt's group."""

    mpp: float
    num_tiles: int
    attrs: dict[str, Any]
    content_digest: str

    @property
    def prefix(self) -> str:
        """What the keys of its arrays begin with."""
        return scale_prefix(self.mpp)


def scale_prefix(mpp: float) -> str:
    """What the keys of a coarser scale's arrays begin with: "mpp-2/"."""
    return f"mpp-{mpp:g}/"


def features_name(view: int) -> str:
    """Name of the array of a view: 0 is the plain one."""
    return f"views/{view}" if view else "features"


@dataclass(frozen=True)
class SlideRecord:
    """What commit.json says of a slide: it exists because this record does.

    `content_digest` is over the logical rows (features, coords, status, and the features of further
    views), whatever the layout; `features_digest` over features and status alone, "" in commits of
    older versions.
    Where there are `scales` coarser than the finest one, all else is of the finest, but `objects`
    are the files of all.
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
    scales: tuple[ScaleRecord, ...] = ()
    features_digest: str = ""

    def at(self, scale: int) -> "SlideRecord":
        """The slide at one scale, 0 being the finest, as if it had no other."""
        if not scale:
            return replace(self, scales=())
        found = self.scales[scale - 1]
        return replace(
            self,
            num_tiles=found.num_tiles,
            attrs=self.attrs | found.attrs,
            content_digest=found.content_digest,
            features_digest="",
            scales=(),
        )

    @property
    def bytes(self) -> int:
        """Bytes on disk, without the record itself."""
        return sum(stored.bytes for stored in self.objects)

    def holds_features(self, digest: str) -> bool:
        """Whether these are the features of a digest of either kind."""
        return digest in (self.content_digest, self.features_digest)

    def to_json(self) -> str:
        """The text of commit.json, with a checksum over itself."""
        value = asdict(self) | {"schema_version": SCHEMA_VERSION}
        for name in ("scales", "features_digest"):
            if not value[name]:
                del value[name]
        return canonical_json(value | {"crc32c": checksum(value)}, "commit record")


def checksum(value: dict[str, Any]) -> int:
    """crc32c over the canonical JSON of all else that a file of the store says.

    Newer releases must keep it so: it tells their files from damaged ones.
    """
    return int(google_crc32c.value(canonical_json(value, "a file of the store").encode()))


def check_checksum(value: dict[str, Any], path: Location) -> None:
    """Take the checksum out of what a file of the store says, and compare it.

    Raises:
        DamagedError: it is missing or wrong.
    """
    stated = value.pop("crc32c", None)
    try:
        right = stated == checksum(value)
    except StoreError as error:  # numbers that JSON cannot hold
        raise malformed(path, error.what) from error
    if not right:
        raise malformed(path, "its checksum is wrong")


def parse_record(data: bytes, path: Location) -> SlideRecord:
    """Read a commit.json, trusting nothing in it.

    Raises:
        StoreError: malformed, newer, out of bounds, or a key that leaves the attempt's folder.
    """
    value = parse_json(data, path)
    check_checksum(value, path)
    check_version(value, path)
    objects = []
    for item in field(value, "objects", list, path):
        if not isinstance(item, dict):
            raise malformed(path, "an entry of 'objects' is not a mapping")
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
        scales=_parse_scales(value, path),
        features_digest=field({"features_digest": "", **value}, "features_digest", str, path),
    )
    if not ATTEMPT_NAME.fullmatch(record.attempt):
        raise malformed(path, f"attempt {record.attempt!r}"[:200])
    for tiles in (record.num_tiles, *(scale.num_tiles for scale in record.scales)):
        if not 0 <= tiles <= MAX_TILES or not 1 <= record.dim <= MAX_DIM:
            raise malformed(path, f"{tiles} tiles of {record.dim} values")
    return record


def _parse_scales(value: dict[str, Any], path: Location) -> tuple[ScaleRecord, ...]:
    if "scales" not in value:
        return ()
    found = []
    for item in field(value, "scales", list, path):
        if not isinstance(item, dict):
            raise malformed(path, "an entry of 'scales' is not a mapping")
        kinds = (("mpp", float), ("num_tiles", int), ("attrs", dict), ("content_digest", str))
        found.append(ScaleRecord(*(field(item, key, kind, path) for key, kind in kinds)))
    return tuple(found)
