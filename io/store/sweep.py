"""Find and delete what killed or beaten writers left behind."""

import time
from collections.abc import Iterator
from contextlib import suppress

from hmil_fast.errors import StoreError
from hmil_fast.io.store import files
from hmil_fast.io.store.commit import read_record
from hmil_fast.io.store.layout import ATTEMPT_NAME, COMMIT_FILE, SLIDES, STORE_FILE
from hmil_fast.io.store.location import Location


def litter(store: Location) -> Iterator[tuple[Location, float]]:
    """Attempts no commit names and temporary files, with the seconds they are untouched."""

    def look(at: tuple[Location, str]) -> list[tuple[Location, float]]:
        return list(_litter(*at))

    slides = [(store / SLIDES / name, COMMIT_FILE) for name in files.names(store / SLIDES)]
    for found in files.each(store, look, [(store, STORE_FILE), *slides]):
        yield from found


def _litter(folder: Location, file: str) -> Iterator[tuple[Location, float]]:
    for name in files.names(folder):
        temporary = name.startswith(f".{file}.") and name.endswith(".tmp")
        if not temporary and not ATTEMPT_NAME.fullmatch(name):
            continue
        path = folder / name
        with suppress(FileNotFoundError):  # its own writer was quicker
            age = time.time() - files.newest_change(path)
            if temporary or _abandoned(folder, name):
                yield path, age


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
                files.remove(path)
            except OSError as error:
                raise files.failed(error, "sweeping", path) from error
    return found, younger
