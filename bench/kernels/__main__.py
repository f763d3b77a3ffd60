"""Run every case of the kernels' benchmark (`hmil-fast bench kernels`); print a table, write JSON.

The cases run under pytest in a process of their own. If that dies or answers no more (a fault in a
GPU kernel leaves no way on), it is started again without the rival that it died of.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.kernels import machine, table
from bench.kernels.cases import grid
from bench.kernels.journal import Journal, Settings

ROOT = Path(__file__).resolve().parents[2]
BUDGET = {"cuda": 400, "cpu": 240}  # s; a case that has begun is finished
PATIENCE = {"cuda": 150, "cpu": 300}  # s without a sign of life; a compiler takes a minute
GRACE = 50  # s beyond the budget for the case that has begun


def main() -> int:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(prog="hmil-fast bench kernels", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--full", action="store_true", help="on a CPU too, up to 1 M instances")
    parser.add_argument(
        "--budget", type=float, metavar="S", help="begin no case later (400 on a GPU, else 240)"
    )
    args = parser.parse_args()
    kind = machine.device().type
    cases = grid(args.full, kind)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            journal=Path(folder) / "journal.jsonl",
            full=args.full,
            deadline=time.time() + (args.budget or BUDGET[kind]),
        )
        code = _measure(settings, Path(folder) / "log")
        journal = Journal(settings.journal)
        known, rows = journal.machine(), journal.rows()
        if known is None:
            sys.stderr.write((Path(folder) / "log").read_text()[-4000:])
            sys.stderr.write("hmil-fast: no case was measured; the reason is above\n")
            return 1
    if args.json:
        args.json.write_text(json.dumps({"machine": known, "rows": rows}, indent=1) + "\n")
    print(table.render(known, rows, len(cases)))
    return code


def _measure(settings: Settings, log: Path) -> int:
    """Until all cases are done, time is up, or a new start leads no further."""
    journal = Journal(settings.journal)
    while True:
        before = len(journal.records())
        code = _child(settings, log)
        if code in (0, 1) or time.time() > settings.deadline:  # 1: a case has no rival that runs
            return 0
        if len(journal.records()) == before:
            return 1


def _child(settings: Settings, log: Path) -> int:
    command = [
        sys.executable, "-m", "pytest", "bench/kernels/test_bench_kernels.py", "-q", "-s",
        "--confcutdir=bench/kernels", "-p", "no:cacheprovider", "--benchmark-only",
        "--benchmark-columns=median",
    ]  # fmt: skip
    journal, patience = Journal(settings.journal), PATIENCE[machine.device().type]
    told, sign = len(journal.rows()), time.time()
    with log.open("a") as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={"OMP_WAIT_POLICY": "passive"} | os.environ | settings.write(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while child.poll() is None:
                time.sleep(0.2)
                if settings.journal.exists():
                    sign = max(sign, settings.journal.stat().st_mtime)
                told = _tell(journal, told)
                if time.time() > settings.deadline + GRACE:
                    break
                if time.time() - sign > patience:
                    last = journal.records()[-1:]
                    if last and "rival" in last[0] and not last[0].get("end"):
                        journal.write(**last[0], crash=f"no answer in {patience} s")
                    break
        finally:
            child.kill()
            child.wait()
    _tell(journal, told)
    return child.returncode


def _tell(journal: Journal, told: int) -> int:
    """A line for every new row, so that who waits sees it go on."""
    rows = journal.rows()
    for row in rows[told:]:
        times = ", ".join(
            f"{name} {found['ms']:.3g}" if "ms" in found else f"{name} failed"
            for name, found in row["rivals"].items()
        )
        sys.stderr.write(f"{row['case']}: {times} ms\n")
    return len(rows)


if __name__ == "__main__":
    sys.exit(main())
