"""Read how far the jobs on a store are, from the files that they write into it."""

import json
import time
from typing import Any

import numpy as np

from hmil_fast.errors import StoreError
from hmil_fast.extraction.jobs.events import EVENTS, FAILED, JOBS, read_json
from hmil_fast.extraction.jobs.leases import is_gone, read_leases
from hmil_fast.io.store import FeatureStore, open_store
from hmil_fast.io.store.backend import backend_of
from hmil_fast.io.store.location import Location, location

WINDOW_SECONDS = 300.0
_TAIL_BYTES = 2**18


def read_status(path: str | Location) -> dict[str, Any]:
    """Read how far the jobs on a store are.

    Returns:
        `committed` (slides), `left` of the newest job (None if unknown), `in_work` (by whom, since
        when, `silent_s` since the last sign of life), `failed` (latest reason and fix; a slide that
        is tried again now is in work instead), `bad_tiles` of slides where some could not be
        decoded, `notes` of slides (what, fix), `processes` that run, and their `tiles_per_second`
        of the last five minutes.

    Raises:
        StoreError: No store there.
    """
    path = location(path)
    # before the slides: one that is committed in between is then not in work
    leases = {lease["slide_id"]: lease for lease in _in_work(path)}
    store = open_store(path)
    committed = set(store.slide_ids())
    failed = {}
    for facts in _read_all(path, FAILED):
        slide_id = facts.get("slide_id") if isinstance(facts, dict) else None
        if not isinstance(slide_id, str) or slide_id in committed:
            continue
        lease = leases.get(slide_id)
        if lease is None or lease["dead"] or lease["since"] <= facts.get("time", 0):
            failed[slide_id] = facts
    backend = backend_of(path)
    lists = backend.stamps(path / JOBS)
    newest = (
        read_json(path / JOBS / max(lists, key=lambda name: lists[name].time)) if lists else None
    )
    left = len(set(newest[0]) - committed - failed.keys()) if newest else None
    logs = [name for name in backend.stamps(path / EVENTS) if name.endswith(".jsonl")]
    rates = list(backend.map(lambda name: _rate(path / EVENTS / name), logs))
    known = _known(store, sorted(committed))
    running = [rate for rate in rates if rate is not None]
    return {
        "store": str(path),
        "committed": len(committed),
        "left": left,
        "in_work": [
            lease for name, lease in leases.items() if name not in committed | failed.keys()
        ],
        "failed": list(failed.values()),
        "bad_tiles": {slide_id: facts[0] for slide_id, facts in known.items() if facts[0]},
        "notes": {slide_id: facts[1] for slide_id, facts in known.items() if facts[1]},
        "processes": len(running),
        "tiles_per_second": round(sum(running), 2),
    }


def _read_all(path: Location, folder: str) -> list[Any]:
    backend = backend_of(path)
    names = [name for name in backend.stamps(path / folder) if name.endswith(".json")]
    found = backend.map(lambda name: read_json(path / folder / name), names)
    return [facts[0] for facts in found if facts]


def _known(store: FeatureStore, slide_ids: list[str]) -> dict[str, tuple[int, list[Any]]]:
    """Undecodable tiles and notes of each slide, as its commit has them."""

    def look(slide_id: str) -> tuple[int, list[Any]]:
        try:
            attrs = store.record(slide_id).attrs
            notes = [(str(what), str(fix)) for what, fix in attrs.get("notes") or ()]
            return int(attrs.get("bad_tiles") or 0), notes
        except (StoreError, ValueError, TypeError):  # `store verify` says so
            return 0, []

    return dict(zip(slide_ids, backend_of(store.path).map(look, slide_ids), strict=True))


def _in_work(path: Location) -> list[dict[str, Any]]:
    latest: dict[str, dict[str, Any]] = {}
    for name, lease, stamp in read_leases(path):  # those of the dead come first
        silent = max(0.0, time.time() - stamp.time)
        facts = {key: lease.get(key) for key in ("slide_id", "host", "pid", "since")}
        if not isinstance(facts["slide_id"], str) or not isinstance(facts["since"], (int, float)):
            continue  # damaged: it is waited out
        seconds = lease.get("seconds")
        dead = isinstance(seconds, (int, float)) and silent > seconds
        slide = name.rpartition(".")[0]
        latest[slide] = {**facts, "silent_s": round(silent, 1), "dead": dead}
        if is_gone(lease):
            del latest[slide]
    return list(latest.values())


def _rate(file: Location) -> float | None:
    """Tiles a second of a process in its last minutes; None where it has ended or is silent."""
    with backend_of(file).open_read(file) as stream:
        tail = np.empty(min(stream.size, _TAIL_BYTES), np.uint8)
        stream.read_into(stream.size - len(tail), [tail])
    lines = tail.tobytes().splitlines()
    events: list[dict[str, Any]] = []
    alive: dict[str, Any] = {}  # the last event that says who the process is
    for line in reversed(lines):
        try:
            event = json.loads(line)
            if not events and event["event"] in ("job end", "continued"):
                return None
            if events and events[0]["time"] - event["time"] > WINDOW_SECONDS:
                break
            events.append(event)
            if not alive and "silent_s" in event:
                alive = event
            if event["event"] == "job start":
                break
        except (ValueError, KeyError, TypeError):  # cut off: still being written, or our tail
            continue
    silent = float(alive.get("silent_s") or WINDOW_SECONDS)
    if not events or time.time() - events[0]["time"] > silent:
        return None
    if is_gone(alive):
        return None
    seconds = events[0]["time"] - events[-1]["time"]
    return (events[0]["tiles"] - events[-1]["tiles"]) / seconds if seconds > 0 else 0.0
