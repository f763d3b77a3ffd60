"""`hmil-fast status`: how far the jobs on a store are, from what they leave in it; read-only."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from hmil_fast.extraction.events import EVENTS, FAILED, JOBS, read_json
from hmil_fast.extraction.leases import LEASES, read_lease
from hmil_fast.io.store import open_store

WINDOW_SECONDS = 300.0
_TAIL_BYTES = 2**18


def status(args: argparse.Namespace) -> int:
    """Print how far the jobs on a store are; exit code 1 where slides failed."""
    found = read_status(args.store)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        _print(found)
    return 1 if found["failed"] else 0


def read_status(path: Path) -> dict[str, Any]:
    """How far the jobs on a store are.

    Returns:
        `committed` (slides), `left` of the newest job (None if unknown), `in_work` (by whom, since
        when, `silent_s` since the last sign of life), `failed` (latest reason and fix),
        `processes` that run, and their `tiles_per_second` of the last five minutes.

    Raises:
        StoreError: No store there.
    """
    committed = set(open_store(path).slide_ids())
    failed = {}
    for file in sorted((path / FAILED).glob("*.json")):
        facts = read_json(file)
        if facts and isinstance(facts[0], dict) and facts[0].get("slide_id") not in committed:
            failed[facts[0].get("slide_id")] = facts[0]
    lists = sorted((path / JOBS).glob("*.json"), key=lambda file: file.stat().st_mtime)
    newest = read_json(lists[-1]) if lists else None
    left = len(set(newest[0]) - committed - failed.keys()) if newest else None
    rates = [_rate(file) for file in (path / EVENTS).glob("*.jsonl")]
    running = [rate for rate in rates if rate is not None]
    return {
        "store": str(path),
        "committed": len(committed),
        "left": left,
        "in_work": [lease for lease in _in_work(path) if lease["slide_id"] not in committed],
        "failed": list(failed.values()),
        "processes": len(running),
        "tiles_per_second": round(sum(running), 2),
    }


def _in_work(path: Path) -> list[dict[str, Any]]:
    latest: dict[str, dict[str, Any]] = {}
    for file in sorted((path / LEASES).glob("[!.]*")):  # those of the dead come first
        found = read_lease(file)
        if found is None:
            continue
        lease, touched_ns = found
        silent = max(0.0, time.time() - touched_ns / 1e9)
        facts = {key: lease.get(key) for key in ("slide_id", "host", "pid", "since")}
        seconds = lease.get("seconds")
        dead = isinstance(seconds, (int, float)) and silent > seconds
        latest[file.stem] = {**facts, "silent_s": round(silent, 1), "dead": dead}
    return list(latest.values())


def _rate(file: Path) -> float | None:
    """Tiles a second of a process in its last minutes; None where it has ended or is silent."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        lines = stream.read().splitlines()
    events: list[dict[str, Any]] = []
    silent = None
    for line in reversed(lines):
        try:
            event = json.loads(line)
            if not events and event["event"] == "job end":
                return None
            if events and events[0]["time"] - event["time"] > WINDOW_SECONDS:
                break
            events.append(event)
            silent = silent or event.get("silent_s")
            if event["event"] == "job start":
                break
        except (ValueError, KeyError, TypeError):  # cut off: still being written, or our tail
            continue
    if not events or time.time() - events[0]["time"] > float(silent or WINDOW_SECONDS):
        return None
    seconds = events[0]["time"] - events[-1]["time"]
    return (events[0]["tiles"] - events[-1]["tiles"]) / seconds if seconds > 0 else 0.0


def _print(found: dict[str, Any]) -> None:
    out = Console(soft_wrap=True, highlight=False)
    left = "" if found["left"] is None else f"{found['left']} left, "
    out.print(
        f"{found['committed']} slides in the store, {left}{len(found['failed'])} failed; "
        f"{found['processes']} processes at {found['tiles_per_second']:,.1f} tiles/s",
        markup=False,
    )
    for lease in found["in_work"]:
        since = time.strftime("%H:%M:%S", time.localtime(lease["since"] or 0))
        silent = f", silent for {lease['silent_s']:.0f} s" if lease["dead"] else ""
        out.print(
            f"  {lease['slide_id']}: since {since} by process {lease['pid']} on "
            f"{lease['host']}{silent}",
            markup=False,
        )
    for slide in found["failed"]:
        out.print(f"  {slide['slide_id']}: {slide['error']}\n    Fix: {slide['fix']}", markup=False)
