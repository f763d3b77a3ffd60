"""Files between the benchmark's command and its measuring process: settings, progress, rows."""

import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.kernels import machine
from bench.kernels.cases import Case, grid

SETTINGS = "HMIL_BENCH"


@dataclass
class Settings:
    """What the command tells the process that measures.

    Attributes:
        journal: File of JSON lines, appended to.
        full: See `cases.grid`.
        deadline: Time (s since 1970) after which no case is begun.
        case_seconds: Of timing, for all rivals of a case; making inputs and compiling not counted.
    """

    journal: Path = field(default_factory=lambda: Path(tempfile.mkdtemp()) / "journal.jsonl")
    full: bool = False
    deadline: float = float("inf")
    case_seconds: float = 0.0

    @classmethod
    def read(cls) -> "Settings":
        """From the environment; the defaults under plain pytest."""
        given = json.loads(os.environ.get(SETTINGS, "{}"))
        if "journal" in given:
            given["journal"] = Path(given["journal"])
        settings = cls(**given)
        if not settings.case_seconds:
            settings.case_seconds = 1.0 if machine.device().type == "cuda" else 6.0
        return settings

    def write(self) -> dict[str, str]:
        """The environment that `read` reads."""
        return {SETTINGS: json.dumps(vars(self) | {"journal": str(self.journal)})}


class Journal:
    """What was begun, what ended, and the rows of the table."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> list[dict[str, Any]]:
        """All of them; a line that a killed process left half-written does not count."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def write(self, **record: Any) -> None:
        """Append a line; it is on its way to the disk when this returns."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Of the table, so far."""
        return [record["row"] for record in self.records() if "row" in record]

    def machine(self) -> dict[str, Any] | None:
        """What `ready` measured."""
        return next((r["machine"] for r in self.records() if "machine" in r), None)

    def crashes(self) -> dict[tuple[str, str], str]:
        """(case, rival) that were begun and never ended, and what is known of why."""
        found: dict[tuple[str, str], str] = {}
        for record in self.records():
            if "rival" not in record:
                continue
            key = record["case"], record["rival"]
            if record.get("end"):
                found.pop(key, None)
            else:
                found[key] = record.get("crash", "its process died")
        return found


def ready(journal: Journal, cases: list[Case]) -> dict[str, Any]:
    """The machine and its ceilings, measured by the first process only."""
    known = journal.machine()
    if known is None:
        found = machine.ceilings(sorted({case.dtype for case in cases}))
        known = machine.describe() | {"ceilings": found}
        journal.write(machine=known)
    return known


def open_cases(settings: Settings) -> list[Case]:
    """Those without a row."""
    done = {row["case"] for row in Journal(settings.journal).rows()}
    kind = machine.device().type
    return [case for case in grid(settings.full, kind) if str(case) not in done]


def out_of_time(settings: Settings) -> bool:
    """Whether no case may begin any more."""
    return time.time() > settings.deadline
