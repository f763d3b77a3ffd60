"""Find and delete files that killed writers left, and files that repair renamed."""

import math
import time
from collections.abc import Iterator
from contextlib import suppress

from hmil_fast.errors import StoreError
from hmil_fast.files import SUFFIX
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.commit import read_record
from hmil_fast.io.store.layout import ASIDE, ATTEMPT_NAME, COMMIT_FILE, SLIDES, STORE_FILE
from hmil_fast.io.store.location import Location


def litter(store: Location) -> Iterator[tuple[Location, float]]:
    """Attempts no commit names, temporary files and what repair set aside, with their seconds.

    Those are the seconds since they were touched, or set aside.
    """

    def look(at: tuple[Location, str]) -> list[tuple[Location, float]]:
        return list(_litter(*at))

    backend = backend_of(store)
    slides = [(store / SLIDES / name, COMMIT_FILE) for name in backend.names(store / SLIDES)]
    for found in backend.map(look, [(store, STORE_FILE), *slides]):
        yield from found


def _litter(folder: Location, file: str) -> Iterator[tuple[Location, float]]:
    backend = backend_of(folder)
    names = backend.names(folder)
    aside = [name for name in names if name.startswith(f"{file}{ASIDE}")]
    stamps = backend.stamps(folder) if aside else {}
    youngest = math.inf
    for name in aside:
        stamp = stamps.get(name)  # a folder in the place of a file has none
        changed = stamp.time if stamp else backend.newest_change(folder / name)
        youngest = min(youngest, time.time() - changed)
        yield folder / name, time.time() - changed
    for name in names:
        temporary = name.startswith(f".{file}.") and name.endswith((".tmp", SUFFIX))  # .tmp: of 0.1
        if not temporary and not ATTEMPT_NAME.fullmatch(name):
            continue
        path = folder / name
        with suppress(FileNotFoundError):  # its own writer was quicker
            age = time.time() - backend.newest_change(path)
            if temporary or _abandoned(folder, name):
                yield path, min(age, youngest)  # a commit that was set aside may mean this one


def _abandoned(slide_dir: Location, attempt: str) -> bool:
    try:
        record = read_record(slide_dir)
    except StoreError:
        return False  # a damaged commit may have meant this one
    return record is None or record.attempt != attempt


def sweep(store: Location, older_than_s: float, *, delete: bool) -> tuple[list[Location], int]:
    """List litter and, if told so, delete it.

    Returns:
        That untouched for so many seconds, and how many pieces are younger and stay.

    Raises:
        StoreError: something cannot be deleted.
    """
    found, younger = list[Location](), 0
    for path, age in litter(store):
        if not age >= older_than_s:  # nor where that is no number
            younger += 1
            continue
        found.append(path)
        if delete:
            try:
                backend_of(path).remove(path)
            except OSError as error:
                raise backend_of(path).failed(error, "sweeping", path) from error
    return found, younger
