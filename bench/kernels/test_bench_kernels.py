"""Measure one case a test; `hmil-fast bench kernels` runs them and restarts after a crash."""

from functools import partial

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.kernels.cases import Case, grid
from bench.kernels.journal import Journal, Settings, open_cases, out_of_time, ready
from bench.kernels.machine import device
from bench.kernels.measure import Measurement

_SETTINGS = Settings.read()


@pytest.mark.parametrize("case", open_cases(_SETTINGS), ids=str)
def test_kernels(benchmark: BenchmarkFixture, case: Case) -> None:
    """All rivals in turns, so that a busy machine is as hard on the one as on the other."""
    if out_of_time(_SETTINGS):
        pytest.skip("out of time")
    journal = Journal(_SETTINGS.journal)
    known = ready(journal, grid(_SETTINGS.full, device().type))
    measured = Measurement(case, _SETTINGS)
    if measured.names:
        *others, ours = measured.names
        rounds = measured.rounds()
        benchmark.pedantic(
            measured.turn, (ours,), setup=partial(_turns, measured, others), rounds=rounds
        )
    row = measured.row(known)
    benchmark.extra_info.update(row)
    journal.write(row=row)
    measured.close()
    if not row["rivals"] or all("failed" in found for found in row["rivals"].values()):
        pytest.fail(str(row["rivals"]))


def _turns(measured: Measurement, names: list[str]) -> None:
    for name in names:
        measured.turn(name)
