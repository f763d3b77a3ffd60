"""The kernels' benchmark: its formulas, its rivals, its table, and that no rival can end it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.kernels import counts, journal, table, work
from bench.kernels.cases import Case, grid
from bench.kernels.measure import Measurement
from hmil_fast.models.hmil import HMIL

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {
    "device": "a GPU", "kind": "cuda", "threads": 1, "python": "3.12", "torch": "2", "triton": "3",
    "date": "today", "ceilings": {"bytes": 3e12, "fp32": 6e13, "bf16": 8e14},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HMIL_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def settings(tmp_path: Path) -> journal.Settings:
    return journal.Settings(journal=tmp_path / "journal.jsonl", case_seconds=1e-6)


def _eager(case: Case) -> work.Work:
    """The rivals without those that need a compiler, and the minute that it takes."""
    made = work.build(case)
    made.rivals = {name: r for name, r in made.rivals.items() if "compile" not in name}
    return made


@pytest.mark.parametrize("bags", [1, 3])
@pytest.mark.parametrize("family", ["hmil", "core", "pool", "alignment", "supcon"])
def test_rivals_compute_the_same(
    family: str, bags: int, settings: journal.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(family, "step", "fp32", 20, bags)
    monkeypatch.setattr("bench.kernels.measure.build", _eager)
    row = Measurement(case, settings).row(MACHINE)
    wanted = {"hmil": {"clean", "folded", "ours"}, "core": {"folded", "ours"}}
    wanted["hmil"] |= {"padded", "by bag"} if bags > 1 else set()
    assert wanted.get(family, {"clean", "ours"}) <= row["rivals"].keys()
    for name, found in row["rivals"].items():
        assert found.get("failed") is None, name
        assert found["error"] < 1e-4, name


def test_the_unfolded_rival_is_the_published_formula() -> None:
    case = Case("hmil", "forward", "fp32", 20, 3)
    made = work.build(case)
    clean = made.runner("clean", "forward")(0)
    torch.manual_seed(0)
    model = HMIL(counts.FEATURES, counts.CLASSES)
    sizes = torch.tensor(case.lengths())
    bags = torch.stack([sizes.cumsum(0) - sizes, sizes], 1)
    model.load_state_dict(
        dict(zip(model.state_dict(), [w.detach() for w in made.weights], strict=True))
    )
    published = model.forward_unfolded(made.inputs[0][0], bags).logits
    torch.testing.assert_close(tuple(clean), published, rtol=1e-4, atol=1e-5)


def test_bags_add_up() -> None:
    for rows in (1000, 12_345, 1_000_000):
        lengths = Case("hmil", "step", "bf16", rows, 64).lengths()
        assert (sum(lengths), len(lengths)) == (rows, 64)
        assert min(lengths) > 0.2 * rows / 64
        assert max(lengths) < 1.8 * rows / 64


def test_counts_are_those_of_the_formulas() -> None:
    forward = counts.stages("hmil", "forward", 1, 2)
    # 524 kFLOP for W1, 328 for the gates, 11.5 for scores and sums; 3.2 KB
    assert (
        sum(s.flop for s in forward) == 2 * 1024 * 256 + 4 * 256 * 320 + 2 * 320 * 10 + 2 * 10 * 256
    )
    assert sum(s.bytes for s in forward) == 2 * (1024 + 256 + 256) + 40
    assert counts.unfolded_flop("forward") == pytest.approx(2.69e6, rel=0.01)
    step = counts.stages("hmil", "step", 1, 2)
    # an H100 by its ceilings: 4.2 ns, of which 1.3 forward
    assert counts.floor_seconds(forward, 1, 798e12, 3e12) == pytest.approx(1.3e-9, rel=0.03)
    assert counts.floor_seconds(step, 1, 798e12, 3e12) == pytest.approx(4.2e-9, rel=0.03)
    assert sum(s.flop for s in counts.stages("supcon", "step", 4096, 4)) == 6 * 4096 * 256


def test_a_rival_that_fails_is_written_down(
    settings: journal.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(case: Case) -> work.Work:
        made = _eager(case)
        made.rivals["folded"].forward = lambda inputs: [torch.full((1, 3), torch.nan)] * 2
        made.rivals["ours"].elements = 1e30
        return made

    def dies(inputs: work.Inputs) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError

    def dying(case: Case) -> work.Work:
        made = broken(case)
        made.rivals["clean"].forward = dies
        return made

    case = Case("hmil", "forward", "fp32", 20, 1)
    monkeypatch.setattr("bench.kernels.measure.build", broken)
    rivals = Measurement(case, settings).row(MACHINE)["rivals"]
    assert "ms" in rivals["clean"]
    assert "its results are nan from the first rival's" in rivals["folded"]["failed"]
    assert "GiB" in rivals["ours"]["failed"]
    monkeypatch.setattr("bench.kernels.measure.build", dying)
    assert Measurement(case, settings).row(MACHINE)["rivals"]["clean"]["failed"] == "out of memory"


def test_a_rival_that_killed_its_process_is_left_out(
    settings: journal.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.kernels.measure.build", _eager)
    log = journal.Journal(settings.journal)
    log.write(case="hmil-forward-fp32-20x1", rival="clean")
    log.write(case="hmil-forward-fp32-20x1", rival="clean", end=True)
    log.write(case="hmil-forward-fp32-20x1", rival="ours")
    with settings.journal.open("a") as file:
        file.write('{"case": "hmil-forw')  # cut short by the death
        file.write("\n")
    assert list(log.crashes()) == [("hmil-forward-fp32-20x1", "ours")]
    for rows, why in ((20, "its process died"), (30, "crashed in hmil-forward-fp32-20x1")):
        row = Measurement(Case("hmil", "forward", "fp32", rows, 1), settings).row(MACHINE)
        assert row["rivals"]["ours"] == {"failed": why}
        assert "ms" in row["rivals"]["clean"]
    row = Measurement(Case("core", "forward", "fp32", 20, 1), settings).row(MACHINE)
    assert "ms" in row["rivals"]["ours"]


def _row(fused: float | None, rows: int = 100_000) -> dict[str, Any]:
    rivals: dict[str, Any] = {
        name: {"ms": ms, "floor_share": 0.5, "peak_mib": 10.0}
        for name, ms in (("folded", 3.0), ("folded compile", 2.4), ("ours", 2.0))
    }
    rivals["fused"] = {"failed": "out of memory"} if fused is None else {"ms": fused}
    return {
        "case": f"core-forward-bf16-{rows}x1", "family": "core", "phase": "forward",
        "dtype": "bf16", "rows": rows, "bags": 1, "rivals": rivals,
    }  # fmt: skip


def test_the_table_and_its_verdict() -> None:
    text = table.render(MACHINE, [_row(None)], 2)
    assert (
        "| core forward bf16 100k/1 | – | – | 3 | 2.4 | – | – | 2 | failed | – | – | 1.20 | 0.50 |"
        " 10 / 10 |"
    ) in text
    assert "- core-forward-bf16-100000x1, fused: out of memory" in text
    assert "Out of time: 1 of 2 cases were not run." in text
    assert "not measured, a side of it failed" in text
    assert "1.50× at N = 100,000: met" in table.verdict(MACHINE, [_row(1.6)])
    said = table.verdict(MACHINE, [_row(1.6), _row(2.2, 1_000_000)])
    assert "1.50× at N = 100,000, 1.09× at N = 1,000,000: NOT met" in said
    assert "there is no GPU" in table.verdict(MACHINE | {"kind": "cpu"}, [_row(1.6)])


def test_the_grid_of_a_gpu_holds_what_was_asked_for() -> None:
    found = grid(False, "cuda")
    assert len(set(map(str, found))) == len(found)
    for family in ("hmil", "core", "pool"):
        sizes = {(c.rows, c.bags) for c in found if (c.family, c.dtype) == (family, "bf16")}
        assert sizes == {(n, b) for n in (1000, 10_000, 100_000, 1_000_000) for b in (1, 64)}
    assert {c.rows for c in found if c.family == "supcon"} == {448, 4096, 16_384, 65_536}
    # the kill criterion comes first, in case time runs out
    assert str(found[0]) == "core-forward-bf16-1000000x1"


@pytest.mark.slow
def test_it_needs_neither_store_nor_decoders() -> None:
    """On a machine with torch, Triton, numpy, pytest and pytest-benchmark alone."""
    code = (
        "import sys\n"
        "for name in ('zarr', 'cucim', 'nvidia.dali', 'openslide', 'timm', 'tifffile', 'yaml'):\n"
        "    sys.modules[name] = None\n"
        "import bench.kernels.__main__, bench.kernels.prove, bench.kernels.measure\n"
        "assert not [m for m in sys.modules if m.startswith(('hmil_fast.io', 'hmil_fast.bags'))]\n"
        "sys.exit(bench.kernels.prove.main([]))\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("Not proved: there is no GPU here.")
