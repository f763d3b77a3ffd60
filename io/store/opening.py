"""Make or open a store."""

import uuid
from dataclasses import asdict

from hmil_fast.errors import StoreError
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.layout import (
    COMMIT_FILE,
    MAX_FILE_BYTES,
    SCHEMA_VERSION,
    SLIDES,
    STORE_FILE,
)
from hmil_fast.io.store.location import Location, location
from hmil_fast.io.store.schema import (
    StoreSpec,
    canonical_json,
    check_checksum,
    check_version,
    checksum,
    differences,
    field,
    malformed,
    parse_json,
)
from hmil_fast.io.store.store import FeatureStore

_FIELDS = (("dim", int), ("dtype", str), ("encoder", dict), ("tiling", dict))
_BEFORE_CHECKSUMS = {"schema_version", "uuid", *(name for name, _ in _FIELDS)}


def create_store(path: str | Location, spec: StoreSpec) -> FeatureStore:
    """Make a store, or open the one that is there if its spec is the same.

    Args:
        path: A folder, or a URL such as s3://bucket/prefix.
        spec: What its slides share.

    Raises:
        StoreError: a store of another spec lies there, or slides without a store.json; the folder
            cannot be written; an object store cannot be reached, or does not make writes
            conditional.
    """
    path = location(path)
    backend = backend_of(path)
    backend.check(path, writing=True)
    if not backend.exists(path / STORE_FILE):
        try:
            # its slides may be of any spec; another process may have made the store meanwhile
            orphans = backend.folders_with(path / SLIDES, COMMIT_FILE)
            if orphans and not backend.exists(path / STORE_FILE):
                raise _no_store(path, slides=True)
            backend.make_folder(path / SLIDES)
            write_about(path, spec, str(uuid.uuid4()))
        except OSError as error:
            raise backend.failed(error, "creating the store", path) from error
    store = open_store(path)
    parts = differences(asdict(store.spec), asdict(spec))
    if parts:
        raise StoreError(
            f"the store {path} holds other features: {'; '.join(parts)}",
            "Give a new folder with --store, or the settings that this store was made with.",
        )
    return store


def open_store(path: str | Location) -> FeatureStore:
    """Open a store that exists; never writes.

    Raises:
        StoreError: There is no store, it is malformed, or a newer release wrote it.

    Example:
        >>> import hmil_fast
        >>> store = hmil_fast.open_store("features")
        >>> x, bags = store.read_packed(store.slide_ids())  # float16 [ΣN, D], int64 [B, 2]
        >>> len(bags) == len(store.slide_ids())
        True
    """
    path = location(path)
    backend = backend_of(path)
    backend.check(path, writing=False)
    try:
        return FeatureStore(path, *read_about(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _no_store(path, slides=bool(backend.names(path / SLIDES))) from error
    except OSError as error:
        raise backend.failed(error, "opening the store", path) from error


def _no_store(path: Location, *, slides: bool) -> StoreError:
    return StoreError(
        f"no feature store at {path} (there is no {STORE_FILE})",
        f"Run `hmil-fast store repair {path}`: there are slides that tell what it held."
        if slides
        else "Give the folder or URL that `hmil-fast extract --store` wrote.",
    )


def write_about(path: Location, spec: StoreSpec, store_uuid: str) -> bool:
    """Write store.json; False when it is there already."""
    about = asdict(spec) | {"schema_version": SCHEMA_VERSION, "uuid": store_uuid}
    text = canonical_json(about | {"crc32c": checksum(about)}, "spec")
    return backend_of(path).create_exclusive(path / STORE_FILE, text.encode())


def read_about(path: Location) -> tuple[StoreSpec, str]:
    """What store.json says: the spec, and the store's uuid.

    Raises:
        OSError: it cannot be read.
        StoreError: it is malformed, or a newer release wrote it.
    """
    file = path / STORE_FILE
    value = parse_json(backend_of(file).read_bytes(file, MAX_FILE_BYTES), file)
    if "crc32c" in value:
        check_checksum(value, file)
    check_version(value, file)
    found = {key: field(value, key, kind, file) for key, kind in _FIELDS}
    store_uuid = field(value, "uuid", str, file)
    if extra := sorted(value.keys() - _BEFORE_CHECKSUMS):
        raise malformed(file, f"field {extra[0]!r}"[:200])  # perhaps once "crc32c"
    try:
        return StoreSpec(**found), store_uuid
    except StoreError as error:
        raise malformed(file, error.what) from error
