"""Check committed slides to the last bit."""

from collections.abc import Iterator
from dataclasses import dataclass

from hmil_fast.errors import StoreError
from hmil_fast.io.store import files
from hmil_fast.io.store.commit import scan
from hmil_fast.io.store.location import Location
from hmil_fast.io.store.reader import AttemptReader
from hmil_fast.io.store.schema import SlideRecord


@dataclass(frozen=True)
class Finding:
    """What verification found on one slide; problem and fix are empty when ok."""

    slide_id: str
    ok: bool
    problem: str = ""
    fix: str = ""


def check_slide(folder: Location, record: SlideRecord) -> None:
    """Existence, size and crc32c of every file, the content digest, and finite features.

    Raises:
        StoreError: the first thing that is wrong.
    """
    reader = AttemptReader(folder, record)
    found = files.tree(folder)
    for stored in record.objects:
        if stored.key not in found:
            raise reader.damaged(f"{stored.key} is missing")
        if found[stored.key] != stored.bytes:
            raise reader.damaged(
                f"{stored.key} is {found[stored.key]} bytes, committed were {stored.bytes}"
            )
        try:
            crc = files.crc32c_of(folder / stored.key)
        except (OSError, EOFError) as error:
            raise reader.damaged(f"{stored.key} cannot be read: {error}") from error
        if crc != stored.crc32c:
            raise reader.damaged(f"the checksum of {stored.key} is wrong")
    extra = sorted(found.keys() - {stored.key for stored in record.objects})
    if extra:
        raise reader.damaged(f"{extra[0]} was added after the commit")
    for scale, prefix in enumerate(["", *(coarser.prefix for coarser in record.scales)]):
        reader = AttemptReader(folder, record.at(scale), prefix)
        digest, bad = scan(reader)
        if digest != reader.record.content_digest:
            raise reader.damaged("the content digest is wrong")
        if len(bad):
            raise reader.damaged(f"features of row {bad[0]} are not finite")
        if scale < len(record.scales):
            most = record.scales[scale].num_tiles
            if not ((parent := reader.parent()) < most).all() or (parent < 0).any():
                raise reader.damaged(f"{prefix}parent names rows that do not exist")


def findings(slides: Iterator[tuple[str, Location, SlideRecord | StoreError]]) -> Iterator[Finding]:
    """One finding per slide, from its id, attempt folder and record (or why there is none)."""
    for slide_id, folder, record in slides:
        try:
            if isinstance(record, StoreError):
                raise record
            check_slide(folder, record)
        except StoreError as error:
            yield Finding(slide_id, ok=False, problem=error.what, fix=error.fix)
        else:
            yield Finding(slide_id, ok=True)
