"""Whether the fused kernels are right on a GPU: measured once, and kept in a file.

The measurement is `hmil_fast.kernels.proof`, in a process of its own: after a fault in a kernel a
process can do nothing more on a GPU, and a job must not end by a check. What it finds is kept per
GPU model, driver, releases and code, so that others read a file.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hmil_fast.device import driver_version
from hmil_fast.files import write_text
from hmil_fast.kernels.dispatch import exact_products
from hmil_fast.kernels.proof import Measure

Facts = dict[str, str]
_NAMED = 4  # measures that a text names


class Verdict(NamedTuple):
    """What the check found.

    Attributes:
        measures: Of every output that was reached.
        raised: What ended the check before its end; empty if nothing did.
        place: The file that keeps it, or why there is none.
    """

    measures: tuple[Measure, ...]
    raised: str = ""
    place: str = ""

    @property
    def passed(self) -> bool:
        """Whether every output of every kernel is as close to float64 as it must be."""
        return not self.raised and bool(self.measures) and all(m.passed for m in self.measures)

    def text(self) -> str:
        """The numbers: of each case the worst if all passed, else those that did not."""
        worst: dict[str, Measure] = {}
        for m in sorted(self.measures, key=_excess, reverse=True):
            worst.setdefault(m.case, m)
        shown, said = list(worst.values()), []
        if not self.passed:
            shown = [m for m in worst.values() if not m.passed]
            said = [self.raised] if self.raised else []
            more = len(shown) - _NAMED
            said += [f"{more} more cases"] if more > 0 else []
            shown = shown[:_NAMED]
        numbers = [f"{m.case}, {m.output}: {m.error:.1e} (≤ {m.allowed:.1e})" for m in shown]
        return "; ".join([*numbers, *said]) or "nothing was measured"


def find(
    device: torch.device,
    folder: Path | None = None,
    check: Callable[[torch.device], Verdict] | None = None,
) -> Verdict:
    """The verdict on a device: as it was kept, or by a check now, which then is kept.

    Processes that come at once each check, and each puts the same file in place whole. A file that
    is damaged, or a folder that cannot be read or written, costs a check, no more. A check that
    something ended (no compiler, no memory, a fault) is not kept: it may be of the moment. There is
    no time limit, so that a slow machine finds what a fast one does.

    Args:
        device: With an index.
        folder: Where verdicts are; by default `cache_folder()`.
        check: By default `ask`.
    """
    facts, folder = _facts(device), folder or cache_folder()
    path = folder / f"{_name(facts)}.json" if folder else None
    known = _read(path, facts) if path else None
    if known:
        return known
    found = (check or ask)(device)
    if found.raised:
        return found._replace(place="not kept, as the check did not reach its end")
    return found._replace(place=_keep(path, facts, found))


def cache_folder() -> Path | None:
    """Where verdicts are kept: hmil-fast/kernels in $XDG_CACHE_HOME, or in ~/.cache.

    None for a user who has neither.
    """
    wish = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not wish.is_absolute():  # the XDG specification: a relative path is to be ignored
        try:
            wish = Path.home() / ".cache"
        except RuntimeError:
            return None
    return wish / "hmil-fast" / "kernels"


def ask(device: torch.device, command: Sequence[str] | None = None) -> Verdict:
    """Check now, in a process of its own.

    Args:
        device: The device, with an index.
        command: What runs in place of `python -m hmil_fast.kernels.proof`.
    """
    program = [sys.executable, "-P", "-m", "hmil_fast.kernels.proof"]
    precision = "highest" if exact_products() else "high"
    # the modules of this process, wherever it has them from
    search = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)  # noqa: PTH100
    try:
        done = subprocess.run(
            command or [*program, str(device), precision],
            env=os.environ | {"PYTHONPATH": search},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except OSError as error:
        return Verdict((), f"the check did not start ({error})")
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
        return Verdict(_measures(answer["measures"]), str(answer["raised"]))
    except (IndexError, KeyError, TypeError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        return Verdict((), f"the check ended with code {done.returncode} ({last[0][:300]})")


def _facts(device: torch.device) -> Facts:
    """All that a verdict depends on."""
    facts = {"device": device.type, "capability": "", "driver": ""}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        facts["driver"] = driver_version()
    try:
        triton = version("triton")
    except PackageNotFoundError:  # built from source into the path
        triton = "unknown"
    return facts | {
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton,
        "float32 products": "float32" if exact_products() else "tf32",
        "code": code_digest(Path(__file__).resolve().parent),
    }


def code_digest(folder: Path) -> str:
    """SHA-256 of the Python files below a folder, with their paths."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(source)}\n".encode())
        digest.update(source)
    return digest.hexdigest()


def _name(facts: Facts) -> str:
    """Readable, and one for all facts."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{re.sub('[^A-Za-z0-9]+', '-', facts['device']).strip('-')}-{digest[:16]}"


def _read(path: Path, facts: Facts) -> Verdict | None:
    """The verdict in a file; None if there is none that can be trusted."""
    try:
        known = json.loads(path.read_bytes())
        measures = _measures(known["measures"])
        return Verdict(measures, "", str(path)) if measures and known["facts"] == facts else None
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return None


def _keep(path: Path | None, facts: Facts, found: Verdict) -> str:
    """Write a verdict; return its place, or why it has none."""
    if path is None:
        return "not kept (there is no home folder)"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"facts": facts, "measures": found.measures}, indent=1) + "\n")
    except OSError as error:
        return f"not kept ({error})"
    return str(path)


def _measures(given: Any) -> tuple[Measure, ...]:
    """Measures from JSON.

    Raises:
        TypeError: They are not that.
    """
    found = tuple(Measure(*entry) for entry in given)
    for m in found:
        if tuple(map(type, m)) != (str, str, float, float):
            raise TypeError(f"{m} is not a measure")
    return found


def _excess(measure: Measure) -> float:
    """How many times what is allowed; NaN is beyond all numbers."""
    times = measure.error / measure.allowed
    return times if times == times else float("inf")  # noqa: PLR0124
