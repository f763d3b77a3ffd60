"""Measure one case: time, memory and error of each implementation, in turns."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.kernels import counts, machine
from bench.kernels.cases import Case
from bench.kernels.journal import Journal, Settings
from bench.kernels.work import Work, build

# RMS of the difference from the first rival's results over their RMS; beyond it, no time is given.
# wide: this tells another formula from the same one rounded, `prove.py` knows the truth
_TOLERANCE = {"fp32": 0.02, "tf32": 0.05, "bf16": 0.3}
_LOST = 3  # exit code of a process whose device answers no more


@contextmanager
def _kernels(name: str) -> Iterator[None]:
    before = os.environ.get("HMIL_KERNELS")
    os.environ["HMIL_KERNELS"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["HMIL_KERNELS"]
        else:
            os.environ["HMIL_KERNELS"] = before


class Measurement:
    """The rivals of one case, in turns.

    A rival that fails, runs out of memory, gives other results than the first, or crashed before
    is written down with the reason and left out.
    """

    def __init__(self, case: Case, settings: Settings) -> None:
        self.case, self.settings = case, settings
        self.journal = Journal(settings.journal)
        self.found: dict[str, dict[str, Any]] = {}
        self.times: dict[str, list[float]] = {}
        self._runs: dict[str, Callable[[int], list[Tensor]]] = {}
        self._calls: dict[str, int] = {}
        self._truth: list[Tensor] | None = None
        self._at = 0
        self.work: Work | None = None
        crash = self._crash("inputs")
        if crash:
            self.found["inputs"] = {"failed": crash}
        else:
            self._build()
        for name in self.work.rivals if self.work else ():
            self._try(name)
        self._truth = None
        # rivals that failed must hold nothing while the others are timed
        machine.tidy()

    @property
    def names(self) -> list[str]:
        """Rivals that run, ours last."""
        return list(self._runs)

    def rounds(self) -> int:
        """As many as the time allows."""
        turn = sum(self.times[name][0] * self._calls[name] for name in self._runs)
        return min(max(int(self.settings.case_seconds / max(turn, 1e-9)), 1), 9)

    def turn(self, name: str) -> None:
        """Time a rival once, on inputs that it did not have last."""
        run, calls = self._runs.get(name), self._calls.get(name, 1)
        if run is None:
            return
        first, self._at = self._at, self._at + calls
        try:
            spent = self._timed(name, run, first, calls)
        except Exception as error:  # noqa: BLE001 - out of memory beside the others' inputs
            self._drop(name, error)
        else:
            self.times[name].append(spent)

    def row(self, known: dict[str, Any]) -> dict[str, Any]:
        """The row of the table, with what the case must cost on this machine."""
        case, ceilings = self.case, known["ceilings"]
        b = machine.BYTES[case.dtype]
        work = counts.stages(case.family, case.phase, case.rows, b)
        floor = counts.floor_seconds(work, case.rows, ceilings[case.dtype], ceilings["bytes"])
        flop, moved = (case.rows * sum(part) for part in zip(*work, strict=True))
        for name in self._runs:
            taken = self.times[name][1:] or self.times[name]
            spent = median(taken)
            own = flop
            if case.family == "hmil" and name in ("clean", "clean compile", "by bag"):
                own = case.rows * counts.unfolded_flop(case.phase)
            self.found[name] |= {
                "ms": 1000 * spent,
                "ms_least": 1000 * min(taken),
                "turns": len(taken),
                "flop_share": own / spent / ceilings[case.dtype],
                "byte_share": moved / spent / ceilings["bytes"],
                "floor_share": floor / spent,
            }
        shape = {"family": case.family, "phase": case.phase, "dtype": case.dtype}
        size = {"rows": case.rows, "bags": case.bags}
        count = {"floor_ms": 1000 * floor, "flop": flop, "bytes": moved}
        return {"case": str(case)} | shape | size | count | {"rivals": self.found}

    def close(self) -> None:
        """Hold no inputs any more."""
        self._runs.clear()
        self.work = None
        machine.tidy()

    def _build(self) -> None:
        self.journal.write(case=str(self.case), rival="inputs")
        try:
            self.work = build(self.case)
        except Exception as error:  # noqa: BLE001 - of any kind: the next case is another one
            self.found["inputs"] = {"failed": _reason(error)}
            self._check_device("inputs")
        self.journal.write(case=str(self.case), rival="inputs", end=True)

    def _try(self, name: str) -> None:
        case = self.case
        self.found[name] = {}
        crash = self._crash(name)
        # products' inputs are cast to what fits; sums and statistics are in float32
        need = self.work.rivals[name].elements * case.rows * machine.BYTES[case.dtype]
        free = machine.free_bytes()
        if crash or need > 0.8 * free:
            why = crash or f"needs about {need / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
            self.found[name]["failed"] = why
            return
        self.journal.write(case=str(case), rival=name)
        try:
            self._warm(name)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this rival's result
            self._drop(name, error)
        self.journal.write(case=str(case), rival=name, end=True)

    def _warm(self, name: str) -> None:
        """Compile, compare, see the peak, and learn how long a run takes."""
        where = machine.device()
        run = self.work.runner(name, self.case.phase)
        with _kernels(self.work.rivals[name].kernels):
            results = run(0)
            if self._truth is None:
                self._truth = [t.detach() for t in results]
            error = _apart([t.detach() for t in results], self._truth)
            del results
            self.found[name]["error"] = error
            if not error <= _TOLERANCE[self.case.dtype]:
                raise ArithmeticError(f"its results are {error:.1g} from the first rival's")
            peak = machine.peak_bytes(lambda: run(0))
            self.found[name]["peak_mib"] = None if peak is None else peak / 2**20
            once = machine.seconds(lambda: run(1), where)
        self._runs[name] = run
        turn = 0.02 if where.type == "cuda" else 0.1
        self._calls[name] = min(max(int(turn / once), 1), 50)
        self.times[name] = [once]

    def _timed(
        self, name: str, run: Callable[[int], list[Tensor]], first: int, calls: int
    ) -> float:
        def several() -> None:
            for i in range(first, first + calls):
                run(i)

        with _kernels(self.work.rivals[name].kernels):
            return machine.seconds(several, machine.device()) / calls

    def _drop(self, name: str, error: Exception) -> None:
        self._runs.pop(name, None)
        self.found[name]["failed"] = _reason(error)
        error.__traceback__ = None  # its frames hold tensors
        self._check_device(name)
        machine.tidy()

    def _crash(self, name: str) -> str:
        """Why a rival is not tried: it took a process with it in this family and phase."""
        for (case, rival), why in self.journal.crashes().items():
            if rival == name and case == str(self.case):
                return why
            if rival == name != "inputs" and case.split("-")[:2] == [*self.case.group[:2]]:
                return f"crashed in {case}"
        return ""

    def _check_device(self, name: str) -> None:
        """After a fault in a kernel a CUDA context is of no more use: end, to be started anew."""
        if machine.device().type != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.ones(1, device="cuda").sum().item()
        except RuntimeError as error:
            known = self.found.get(name, {}).get("failed", "")
            self.journal.write(case=str(self.case), rival=name, crash=known or _reason(error))
            os._exit(_LOST)


def _apart(ours: list[Tensor], truth: list[Tensor]) -> float:
    """The larger error of the first result and of all else, gradients mostly, as one vector.

    Gradients of padded inputs have another shape; they are left out.
    """
    pairs = [(a, b) for a, b in zip(ours, truth, strict=True) if a.shape == b.shape]
    return max(_gap(part) for part in (pairs[:1], pairs[1:]) if part)


def _gap(pairs: list[tuple[Tensor, Tensor]]) -> float:
    apart = sum(float((a - b).float().square().sum(dtype=torch.float64)) for a, b in pairs)
    size = sum(float(b.float().square().sum(dtype=torch.float64)) for _, b in pairs)
    return (apart / max(size, 1e-30)) ** 0.5


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
