"""Detect a damaged store.json, and rebuild it from the slides."""

import uuid

from hmil_fast.errors import StoreError
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.commit import read_record
from hmil_fast.io.store.layout import (
    COMMIT_FILE,
    MAX_FILE_BYTES,
    SLIDES,
    STORE_FILE,
    aside_name,
)
from hmil_fast.io.store.location import Location, location
from hmil_fast.io.store.opening import open_store, read_about, write_about
from hmil_fast.io.store.schema import SlideRecord, StoreSpec, parse_json
from hmil_fast.io.store.store import FeatureStore


def open_by_slides(path: str | Location) -> tuple[FeatureStore, str]:
    """Open a store as its slides tell of it, also where store.json is damaged; never writes.

    Where all slides agree with each other and not with store.json, store.json is what is damaged.

    Returns:
        The store, and what is wrong with store.json; "" where it is right.

    Raises:
        StoreError: there is no store; store.json cannot be read, or the slides do not tell what it
            must say.
    """
    path = location(path)
    backend_of(path).check(path, writing=False)
    spec, store_uuid, wrong = None, str(uuid.uuid4()), None
    problem = "its configuration is that of no slide, and all slides agree on another"
    try:
        spec, store_uuid = read_about(path)
    except (FileNotFoundError, NotADirectoryError):
        problem = "it is missing"
    except OSError as error:
        raise backend_of(path).failed(error, "opening the store", path) from error
    except StoreError as error:
        wrong, problem = error, f"it {error.what.removeprefix(f'{path / STORE_FILE} ')}"
    told = _spec_of_slides(path, spec)
    if told is None and isinstance(wrong, StoreError):
        raise StoreError(
            f"{wrong.what}; there is no readable slide to restore it from",
            "Restore this file from a backup, or give `hmil-fast extract` a new --store.",
        )
    if told is None:
        return open_store(path), ""  # or says that there is none
    store = FeatureStore(path, told, store_uuid)
    return store, "" if told == spec else f"{path / STORE_FILE} is damaged: {problem}"


def restore(store: FeatureStore) -> None:
    """Write a store's store.json anew; what was in its place is set aside until it is swept.

    Raises:
        StoreError: the disk refuses.
    """
    file = store.path / STORE_FILE
    try:
        if backend_of(file).exists(file):
            backend_of(file).rename(file, aside_name(STORE_FILE))
        write_about(store.path, store.spec, store.uuid)
    except OSError as error:
        raise backend_of(store.path).failed(error, f"restoring {STORE_FILE}", store.path) from error


def _spec_of_slides(path: Location, believed: StoreSpec | None) -> StoreSpec | None:
    """The spec of the slides: the one believed if it is that of any; None without slides.

    Raises:
        StoreError: they are of several, or none of them tells its own.
    """
    found: dict[str, list[tuple[Location, SlideRecord]]] = {}
    for name in backend_of(path).folders_with(path / SLIDES, COMMIT_FILE):
        folder = path / SLIDES / name
        try:
            record = read_record(folder)
        except StoreError:  # damaged itself, or cannot be read
            continue
        if record is None:
            continue
        if believed and record.config_hash == believed.config_hash:
            return believed
        found.setdefault(record.config_hash, []).append((folder / record.attempt, record))
    if not found:
        return None
    if len(found) == 1:
        for attempt, record in next(iter(found.values())):
            if told := _told(attempt, record):
                return told
    why = (
        f"its slides are of {len(found)} configurations"
        if len(found) > 1
        else "none of its slides has a readable zarr.json"
    )
    raise StoreError(
        f"{path / STORE_FILE} is damaged or missing, and cannot be restored: {why}",
        "Restore this file from a backup, or extract the slides to a new --store.",
    )


def _told(attempt: Location, record: SlideRecord) -> StoreSpec | None:
    """The spec that a slide was written with, as its group's attributes tell it."""
    file = attempt / "zarr.json"
    try:
        about = parse_json(backend_of(file).read_bytes(file, MAX_FILE_BYTES), file)["attributes"]
        spec = StoreSpec(record.dim, record.dtype, about["encoder"], about["tiling"])
    except (OSError, StoreError, LookupError, TypeError):
        return None
    return spec if spec.config_hash == record.config_hash else None
