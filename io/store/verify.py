"""Verify committed slides: sizes, checksums, digests, finite features."""

from collections.abc import Iterator
from dataclasses import dataclass

from hmil_fast.errors import DamagedError, StoreError
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.commit import scan
from hmil_fast.io.store.location import Location
from hmil_fast.io.store.reader import AttemptReader
from hmil_fast.io.store.schema import SlideRecord


@dataclass(frozen=True)
class Finding:
    """What verification found on one slide; problem and fix are empty when ok.

    `damaged` says that bytes are missing or wrong. A slide that is neither ok nor damaged could not
    be read, or is of another configuration.
    """

    slide_id: str
    ok: bool
    problem: str = ""
    fix: str = ""
    damaged: bool = False


def check_slide(folder: Location, record: SlideRecord) -> None:
    """Existence, size and crc32c of every file, the content digest, and finite features.

    Raises:
        DamagedError: the first thing that is wrong.
        StoreError: something cannot be read.
    """
    extra = _check_files(AttemptReader(folder, record))
    for scale, prefix in enumerate(["", *(coarser.prefix for coarser in record.scales)]):
        reader = AttemptReader(folder, record.at(scale), prefix)
        digest, _, bad = scan(reader)
        if digest != reader.record.content_digest:
            raise reader.damaged("the content digest is wrong")
        if len(bad):
            raise reader.damaged(f"features of row {bad[0]} are not finite")
        if scale < len(record.scales):
            most = record.scales[scale].num_tiles
            if not ((parent := reader.parent()) < most).all() or (parent < 0).any():
                raise reader.damaged(f"{prefix}parent names rows that do not exist")
    if extra:
        raise StoreError(
            f"slide {record.slide_id!r} is sound, but {extra[0]} was added after the commit "
            f"({folder})",
            "Remove that file.",
        )


def _check_files(reader: AttemptReader) -> list[str]:
    """Check that every file is there and right; keys of those that the commit does not know."""
    folder, objects = reader.folder, reader.record.objects
    try:
        found = backend_of(folder).tree(folder)
    except OSError as error:
        raise reader.failed(error, str(error.filename)) from error
    for stored in objects:
        try:
            if found.get(stored.key) != stored.bytes:  # a listing may be cut, a link has its own
                found |= backend_of(folder).sizes(folder, [stored.key])
        except (FileNotFoundError, NotADirectoryError) as error:
            raise reader.damaged(f"{stored.key} is missing") from error
        except OSError as error:
            raise reader.failed(error, stored.key) from error
        if found[stored.key] != stored.bytes:
            raise reader.damaged(
                f"{stored.key} is {found[stored.key]} bytes, committed were {stored.bytes}"
            )
        try:
            crc = backend_of(folder).crc32c_of(folder / stored.key)
        except OSError as error:
            raise reader.failed(error, stored.key) from error
        except EOFError as error:
            raise reader.damaged(f"{stored.key} ends too soon") from error
        if crc != stored.crc32c:
            raise reader.damaged(f"the checksum of {stored.key} is wrong")
    return sorted(found.keys() - {stored.key for stored in objects})


def findings(slides: Iterator[tuple[str, Location, SlideRecord | StoreError]]) -> Iterator[Finding]:
    """One finding per slide, from its id, attempt folder and record (or why there is none)."""
    for slide_id, folder, record in slides:
        try:
            if isinstance(record, StoreError):
                raise record
            check_slide(folder, record)
        except StoreError as error:
            damaged = isinstance(error, DamagedError)
            yield Finding(slide_id, False, error.what, error.fix, damaged)
        else:
            yield Finding(slide_id, ok=True)
