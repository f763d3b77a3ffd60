"""The verdict on the fused kernels: found by a process of its own, kept in a file."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hmil_fast.kernels.proof import Measure
from hmil_fast.kernels.verdict import Verdict, ask, cache_folder, code_digest, find

CPU = torch.device("cpu")
GOOD = Verdict((Measure("supcon fp32", "lse", 1e-7, 1e-5), Measure("supcon fp32", "z", 0.0, 1e-5)))
BAD = Verdict((Measure("supcon fp32", "lse", float("nan"), 1e-5),))
FIND = """
import sys
from pathlib import Path
import torch
from hmil_fast.kernels.verdict import find
verdict = find(torch.device("cpu"), Path(sys.argv[1]))
assert verdict.passed, verdict.text()
print(verdict.place)
"""


class Checks:
    """A check that gives one verdict and counts how often it was asked."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict, self.count = verdict, 0

    def __call__(self, device: torch.device) -> Verdict:
        self.count += 1
        return self.verdict


@pytest.mark.slow
@pytest.mark.parametrize("where", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_the_check_itself(where: str, run_fused_cases: Callable[[str, str], None]) -> None:
    run_fused_cases("proof", where)


@pytest.mark.parametrize("verdict", [GOOD, BAD])
def test_a_verdict_is_kept(verdict: Verdict, tmp_path: Path) -> None:
    check = Checks(verdict)
    first = find(CPU, tmp_path / "a" / "b", check)
    again = find(CPU, tmp_path / "a" / "b", check)
    assert check.count == 1
    assert [first.passed, again.passed] == [verdict is GOOD] * 2
    assert first.text() == again.text() == verdict.text()
    assert first.place == again.place
    assert [str(path) for path in (tmp_path / "a" / "b").iterdir()] == [first.place]


def test_other_facts_ask_anew(tmp_path: Path) -> None:
    check = Checks(GOOD)
    exact = find(CPU, tmp_path, check)
    torch.set_float32_matmul_precision("high")
    try:
        other = find(CPU, tmp_path, check)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert check.count == 2
    assert exact.place != other.place
    facts = json.loads(Path(exact.place).read_text())["facts"]
    assert facts.keys() == {
        "device", "capability", "driver", "cuda", "torch", "triton", "float32 products", "code",
    }  # fmt: skip
    assert all(facts[name] for name in facts.keys() - {"capability", "driver"})


def test_code_that_changed_has_another_digest(tmp_path: Path) -> None:
    (tmp_path / "op").mkdir()
    kernel = tmp_path / "op" / "fused.py"
    digests = set()
    for text in ("a = 1\n", "a = 2\n"):
        kernel.write_text(text)
        digests.add(code_digest(tmp_path))
    kernel.rename(tmp_path / "op" / "other.py")
    digests.add(code_digest(tmp_path))
    (tmp_path / "op" / "notes.txt").touch()
    digests.add(code_digest(tmp_path))
    assert len(digests) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: "\udcff",
        lambda text: text.replace("1e-07", '"small"'),
        lambda text: text.replace("1e-07", "null"),
        lambda text: json.dumps(json.loads(text) | {"measures": []}),
        lambda text: json.dumps(json.loads(text) | {"measures": [["supcon", "lse"]]}),
        lambda text: json.dumps(json.loads(text) | {"facts": {}}),
    ],
)
def test_a_damaged_file_is_made_anew(damage: Callable[[str], str], tmp_path: Path) -> None:
    check = Checks(GOOD)
    path = Path(find(CPU, tmp_path, check).place)
    whole = path.read_text()
    path.write_text(damage(whole), errors="surrogateescape")
    assert path.read_bytes() != whole.encode()
    assert find(CPU, tmp_path, check).passed
    assert check.count == 2
    assert path.read_text() == whole


def test_a_folder_that_cannot_be_written_costs_a_check_each(tmp_path: Path) -> None:
    check = Checks(GOOD)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", Path("/proc/hmil-fast")):
        before = check.count
        for _ in range(2):
            found = find(CPU, folder, check)
            assert found.passed
            assert found.place.startswith("not kept (")
        assert check.count == before + 2


def test_a_folder_of_somebody_else_costs_a_check_each(tmp_path: Path) -> None:
    check, me = Checks(GOOD), os.geteuid()
    tmp_path.chmod(0o500)
    if me == 0:  # root may write everywhere
        os.seteuid(65534)
    try:
        for _ in range(2):
            assert find(CPU, tmp_path, check).place.startswith("not kept ([Errno 13]")
    finally:
        os.seteuid(me)
        tmp_path.chmod(0o700)
    assert check.count == 2
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_read_or_replaced_costs_a_check(tmp_path: Path) -> None:
    check = Checks(GOOD)
    path = Path(find(CPU, tmp_path, check).place)
    path.unlink()
    path.mkdir()
    (path / "something").touch()
    found = find(CPU, tmp_path, check)
    assert found.passed
    assert found.place.startswith("not kept (")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_check_that_something_ended_is_made_again(tmp_path: Path) -> None:
    check = Checks(Verdict(GOOD.measures, "supcon fp32: OutOfMemoryError: full"))
    for _ in range(2):
        found = find(CPU, tmp_path, check)
        assert not found.passed
        assert found.place == "not kept, as the check did not reach its end"
        assert found.text() == "supcon fp32: OutOfMemoryError: full"
    assert check.count == 2
    assert not list(tmp_path.iterdir())


def test_the_folder_is_that_of_the_xdg_specification(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hmil-fast" / "kernels"
    monkeypatch.setenv("HOME", "/home/x")
    for ignored in ("", "some/where"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_folder() == Path("/home/x/.cache/hmil-fast/kernels")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            f"import os; os.kill(os.getpid(), {signal.SIGSEGV.value})",
            "the check ended with code -11 (it said nothing)",
        ),
        ("raise SystemExit('no\\nmemory')", "the check ended with code 1 (memory)"),
        ("print('hello')", "the check ended with code 0 (it said nothing)"),
        ('print(\'{"measures": [[1, 2, 3, 4]], "raised": ""}\')', "the check ended with code 0"),
        ("import sys; sys.stdout.buffer.write(bytes([255]))", "the check ended with code 0"),
    ],
)
def test_a_check_that_dies_is_no_end_of_the_job(code: str, said: str) -> None:
    found = ask(CPU, [sys.executable, "-c", code])
    assert not found.passed
    assert found.raised.startswith(said)


def test_a_check_that_cannot_start_is_no_end_of_the_job(tmp_path: Path) -> None:
    assert ask(CPU, [str(tmp_path / "none")]).raised.startswith("the check did not start (")


def test_last_words_count_whatever_the_process_ends_with() -> None:
    said = '{"measures": [["a fp32", "lse", 0.5, 0.1]], "raised": "b: CUDA error"}'
    code = f"import os; print({said!r}, flush=True); os.abort()"
    assert ask(CPU, [sys.executable, "-c", code]) == Verdict(
        (Measure("a fp32", "lse", 0.5, 0.1),), "b: CUDA error"
    )


def test_the_numbers_of_what_failed_come_first() -> None:
    measures = [Measure(f"case {k}", "lse", 0.2 + k, 0.1) for k in range(6)]
    measures += [Measure("case 7", "lse", 1e-7, 0.1), Measure("case 5", "z", float("nan"), 0.1)]
    assert Verdict(tuple(measures)).text() == (
        "case 5, z: nan (≤ 1.0e-01); case 4, lse: 4.2e+00 (≤ 1.0e-01); "
        "case 3, lse: 3.2e+00 (≤ 1.0e-01); case 2, lse: 2.2e+00 (≤ 1.0e-01); 2 more cases"
    )
    assert GOOD.text() == "supcon fp32, lse: 1.0e-07 (≤ 1.0e-05)"
    assert not Verdict(()).passed


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_two_processes_at_once_agree(tmp_path: Path) -> None:
    jobs = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", FIND, str(tmp_path / "cache")],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    places = {job.communicate(timeout=600)[0].strip() for job in jobs}
    assert [job.returncode for job in jobs] == [0, 0]
    assert places == {str(path) for path in (tmp_path / "cache").iterdir()}
    assert len(places) == 1
    known = json.loads(Path(places.pop()).read_text())
    assert {entry[0].split()[0] for entry in known["measures"]} == {
        "gated_attention_pool", "hierarchy_alignment", "supcon",
    }  # fmt: skip
