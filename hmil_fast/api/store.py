"""Look after a feature store: what it holds, whether it is sound, what stopped jobs left in it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hmil_fast.errors import StoreError, UsageError
from hmil_fast.extraction.jobs.leases import abandoned_leases
from hmil_fast.io.store import FeatureStore, Finding
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.location import Location
from hmil_fast.io.store.restore import open_by_slides, restore
from hmil_fast.io.store.sweep import sweep as sweep_store

FEW = 3  # damaged slides that repair drops without being told

# shows the progress of a loop over `count` findings
Track = Callable[[Iterable[Finding], int], Iterable[Finding]]


def untracked(findings: Iterable[Finding], count: int) -> Iterable[Finding]:
    """Show no progress."""
    return findings


@dataclass(frozen=True)
class Repair:
    """What `repair` did.

    Attributes:
        restored: What was wrong with store.json, which is restored; "" if nothing.
        checked: Number of slides.
        dropped: Slides that were dropped; extract them again.
        left: Slides with problems that are left as they are: id, problem and fix.
        refused: Damaged slides that were not dropped, because they are more than `FEW`.
    """

    restored: str
    checked: int
    dropped: Sequence[str]
    left: Sequence[tuple[str, str, str]]
    refused: Sequence[Finding]


@dataclass(frozen=True)
class Sweep:
    """What stopped jobs left in a store.

    Attributes:
        attempts: Attempts at slides that no commit names.
        leases: Leases on slides that are in the store.
        younger: Attempts that are too young: a job may work on them.
    """

    attempts: Sequence[Location]
    leases: Sequence[Location]
    younger: int


def open_damaged(place: Location) -> tuple[FeatureStore, str]:
    """Open a store whose store.json may be damaged; return what is wrong with it, or "".

    Raises:
        StoreError: There is no store, or its slides do not tell what store.json held.
    """
    return open_by_slides(place)


def describe(store: FeatureStore) -> tuple[dict[str, Any], bool]:
    """Return what all slides of a store share, tiles and mpp of each, and whether all can be read.

    `problems` in the mapping says what cannot be read.
    """
    sound = True
    about = store.info()
    slides: dict[str, dict[str, Any]] = {}
    for slide_id, record in store.records().items():
        if isinstance(record, StoreError):
            sound = False
            continue
        mpp = record.attrs.get("mpp", {})
        counts = [record.num_tiles, *(scale.num_tiles for scale in record.scales)]
        slides[slide_id] = {"tiles": sum(counts), "mpp": mpp.get("level0")}
        slides[slide_id]["bad_tiles"] = record.attrs.get("bad_tiles")  # unknown for imported ones
        if record.scales:
            slides[slide_id]["scales"] = [
                {"mpp": at, "tiles": n} for at, n in zip(store.spec.scales, counts, strict=True)
            ]
    return {**about, "slide_ids": slides}, sound


def verify(store: FeatureStore, track: Track = untracked) -> tuple[list[Finding], int]:
    """Check every checksum of every slide; return the slides with problems, and their number."""
    count = len(store.slide_ids()) + len(store.unnamed)
    return [finding for finding in track(store.verify(), count) if not finding.ok], count


def repair(place: Location, *, many: bool = False, track: Track = untracked) -> Repair:
    """Restore a damaged store.json, and drop damaged slides so that `extract` makes them again.

    A slide is dropped only if two checks found its bytes missing or wrong.

    Args:
        place: Folder or URL of the store.
        many: Drop damaged slides even if they are more than three.
        track: Shows progress.

    Raises:
        StoreError: There is no store, or store.json cannot be restored.
    """
    store, problem = open_damaged(place)
    if problem:
        restore(store)
    bad, count = verify(store, track)
    left = [(f.slide_id, f.problem, f.fix) for f in bad if not f.damaged]
    damaged = [finding for finding in bad if finding.damaged]
    if len(damaged) > FEW and not many:
        return Repair(problem, count, [], left, damaged)
    dropped = []
    for finding in damaged:
        again = next(store.verify([finding.slide_id]))
        if not again.damaged:
            now = again.problem or "the second check found nothing wrong"
            left.append((finding.slide_id, now, again.fix))
            continue
        try:
            store.set_aside(finding.slide_id)
        except StoreError as error:
            left.append((finding.slide_id, error.what, error.fix))
            continue
        dropped.append(finding.slide_id)
    return Repair(problem, count, dropped, left, [])


def drop(store: FeatureStore, slide_ids: Sequence[str]) -> Iterator[str]:
    """Drop slides; yield the id of each once it is dropped.

    Raises:
        UsageError: No slides are named, or the store does not have one of them.
    """
    if not slide_ids:
        raise UsageError("no slide to drop was named", "name slide ids behind the store")
    unknown = sorted(set(slide_ids).difference(store.slide_ids(), store.unnamed))
    if unknown:
        raise UsageError(
            f"the store {store.path} has no slide {unknown[0]!r}",
            "see the ids with `hmil-fast store info`",
        )
    for slide_id in slide_ids:
        store.drop(slide_id)
        yield slide_id


def sweep(store: FeatureStore, older_than_hours: float, *, delete: bool = False) -> Sweep:
    """List, or delete, attempts that no commit names, and leases on slides that are stored."""
    seconds = older_than_hours * 3600
    attempts, younger = sweep_store(store.path, seconds, delete=delete)
    leases = abandoned_leases(store.path, store.slide_ids(), seconds)
    for path in leases if delete else ():
        backend_of(path).unlink(path)
    return Sweep(attempts, leases, younger)
