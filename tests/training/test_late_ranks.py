"""Processes of torchrun that come late, or not at all, wherever they meet over a fold."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# starts the command line with one process that sleeps before and after what opens, resumes and
# ends a fold, or with a first process that is killed at such a place
LATE = """
import os, signal, sys, time
from hmil_fast import cli
from hmil_fast.training import checkpoint, fold, ranks
from hmil_fast.training.run_folder import Run

late, seconds = os.environ["LATE"].split(":")
place, _, count = os.environ["KILL"].partition(":")
fold.SAVE_EVERY_S = 0.0
calls = []

def wrap(owner, name):
    whole = getattr(owner, name)
    def wrapped(*args, **named):
        if os.environ["RANK"] == "0" and name == place:
            calls.append(name)
            if len(calls) == int(count):
                os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["RANK"] == late and name != "_train_epoch":
            time.sleep(float(seconds))
            result = whole(*args, **named)
            time.sleep(float(seconds))
            return result
        return whole(*args, **named)
    setattr(owner, name, wrapped)

for owner, names in (
    (Run, ("is_done",)),
    (fold.FoldTrainer, ("__init__", "_resume", "_train_epoch", "train")),
    (fold, ("read_checkpoint", "write_predictions")),
):
    for name in names:
        wrap(owner, name)
sys.exit(cli.main())
"""
SETTINGS = ("folds=2", "epochs=3", "baseline=none", "batch_bags=6")
FILES = ("fold-0/best.safetensors", "fold-1/best.safetensors", "fold-0/predictions.csv",
         "fold-1/predictions.csv", "predictions.csv", "fold-1/val_predictions.csv")  # fmt: skip

Train = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def train(
    cohort: Any,
    settings: tuple[str, ...],
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Train:
    """Two processes over one run folder; `late` is "rank:seconds", `kill` "function:call"."""
    folder = tmp_path_factory.mktemp("late")
    (folder / "late.py").write_text(LATE)

    def run(out: Path, late: str = "9:0", kill: str = "") -> "subprocess.CompletedProcess[str]":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        arguments = ["train", *cohort.arguments, *settings, *SETTINGS, "--out", str(out)]
        return subprocess.run(
            [sys.executable, *torchrun, "--max-restarts", "0", str(folder / "late.py"), *arguments],
            cwd=folder,
            env={**environment, "LATE": late, "KILL": kill},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def undisturbed(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = train(out)
    assert done.returncode == 0, done.stderr
    return {name: (out / name).read_bytes() for name in FILES}


@pytest.fixture(
    scope="module",
    params=[("write_predictions:1", "fold-0"), ("_train_epoch:5", "fold-1")],
    ids=["at the end of a fold", "within the second fold"],
)
def killed(
    train: Train, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """A run whose first process was killed."""
    kill, left = request.param
    out: Path = tmp_path_factory.mktemp("killed") / "run"
    assert train(out, kill=kill).returncode != 0
    assert [path.parent.name for path in out.glob("fold-*/last.safetensors")] == [left]
    return out


@pytest.mark.parametrize("late", [0, 1])
def test_a_late_process_changes_nothing(
    train: Train, undisturbed: dict[str, bytes], killed: Path, tmp_path: Path, late: int
) -> None:
    out = shutil.copytree(killed, tmp_path / "run")
    done = train(out, late=f"{late}:0.5")
    assert done.returncode == 0, done.stderr
    for name, wanted in undisturbed.items():
        assert (out / name).read_bytes() == wanted, name
    assert not list(out.glob("fold-*/last.safetensors"))


MEETING = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch
from hmil_fast.errors import HmilError
from hmil_fast.training import ranks

with ranks.process_group(torch.device("cpu")):
    got = ranks.from_first({"rank": ranks.rank(), "inf": float("inf")}, {
        "a.b": torch.arange(6).reshape(2, 3).to(torch.bfloat16), "step": torch.tensor(7.0),
        "none": torch.empty(0, 3)})
    assert got[0] == {"rank": 0, "inf": float("inf")}, got
    assert got[1]["a.b"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (got[1]["step"].shape, got[1]["none"].shape) == ((), (0, 3))
ranks.PATIENCE = timedelta(seconds=5)
try:
    with ranks._together():
        if ranks.rank() != 1:
            ranks.wait_for_all()
        while not Path(sys.argv[1]).exists():
            time.sleep(0.1)
except HmilError as error:
    print(error, flush=True)
    if ranks.rank() == 0:
        Path(sys.argv[1]).write_text(str(error))
import os
os._exit(0)
"""


def test_a_process_that_does_not_come_is_named(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "meeting.py").write_text(MEETING)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    done = subprocess.run(
        [sys.executable, *torchrun, "meeting.py", str(tmp_path / "said")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "said").read_text()
    assert "process 0 of 3 has waited for the others in vain" in said
    assert "Ranks 1 failed" in said
    assert "the same command resumes" in said
