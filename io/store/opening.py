"""Make or open a store."""

import uuid
from dataclasses import asdict

from hmil_fast.errors import StoreError
from hmil_fast.io.store import files
from hmil_fast.io.store.layout import MAX_FILE_BYTES, SCHEMA_VERSION, SLIDES, STORE_FILE
from hmil_fast.io.store.location import Location, location
from hmil_fast.io.store.schema import (
    StoreSpec,
    canonical_json,
    check_version,
    differences,
    field,
    malformed,
    parse_json,
)
from hmil_fast.io.store.store import FeatureStore


def create_store(path: str | Location, spec: StoreSpec) -> FeatureStore:
    """Make a store, or open the one that is there if its spec is the same.

    Args:
        path: A folder, or a URL such as s3://bucket/prefix.
        spec: What its slides share.

    Raises:
        StoreError: a store of another spec lies there, or the folder cannot be written; an object
            store cannot be reached, or does not make writes conditional.
    """
    path = location(path)
    about = asdict(spec) | {"schema_version": SCHEMA_VERSION, "uuid": str(uuid.uuid4())}
    files.check(path, writing=True)
    if not files.exists(path / STORE_FILE):
        try:
            files.make_folder(path / SLIDES)
            files.create_exclusive(path / STORE_FILE, canonical_json(about, "spec").encode())
        except OSError as error:
            raise files.failed(error, "creating the store", path) from error
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
        StoreError: there is none, it is malformed, or a newer release wrote it.
    """
    path = location(path)
    files.check(path, writing=False)
    file = path / STORE_FILE
    try:
        value = parse_json(files.read_bytes(file, MAX_FILE_BYTES), file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(
            f"no feature store at {path} (there is no {STORE_FILE})",
            "Give the folder or URL that `hmil-fast extract --store` wrote.",
        ) from error
    except OSError as error:
        raise files.failed(error, "opening the store", path) from error
    check_version(value, file)
    spec = {
        key: field(value, key, kind, file)
        for key, kind in (("dim", int), ("dtype", str), ("encoder", dict), ("tiling", dict))
    }
    try:
        return FeatureStore(path, StoreSpec(**spec), field(value, "uuid", str, file))
    except StoreError as error:
        raise malformed(file, error.what) from error
