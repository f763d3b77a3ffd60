"""Processes of one training that come late, or not at all, wherever they meet over a fold."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

# Imports once, then forks the two processes of a training for every line it is told, as torchrun
# starts them. One process sleeps before and after what opens, resumes and ends a fold, or the first
# one is killed at such a place.
NURSERY = """
import json, os, signal, socket, sys, time
import torch.utils.tensorboard
from hmil_fast.cli.main import main
from hmil_fast.training import fold
from hmil_fast.api import train as command
from hmil_fast.runs.run import (Run)

def wrap(owner, name, rank, told):
    whole, calls = getattr(owner, name), []
    place, _, count = told["kill"].partition(":")
    def wrapped(*args, **named):
        calls.append(name)
        if rank == 0 and name == place and len(calls) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        pause = told["seconds"] if rank == told["late"] and name != "train_epoch" else 0
        time.sleep(pause)
        result = whole(*args, **named)
        time.sleep(pause)
        return result
    setattr(owner, name, wrapped)

def child(rank, port, told):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    said = os.open(told["said"] + str(rank), os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    fold.SAVE_EVERY_S = 0.0
    for owner, names in (
        (Run, ("is_done",)),
        (fold.FoldTrainer, ("__init__", "_resume", "train_epoch", "train")),
        (fold, ("read_checkpoint", "write_predictions")),
        (command, ("create_run", "train_run")),
    ):
        for name in names:
            wrap(owner, name, rank, told)
    return main(told["argv"])

for line in sys.stdin:
    told = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 1
            try:
                code = child(rank, port, told)
            finally:
                sys.stdout.flush()
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps(codes), flush=True)
"""
SETTINGS = ("folds=2", "epochs=3", "baseline=none", "batch_bags=6")
FILES = ("fold-0/best.safetensors", "fold-1/best.safetensors", "fold-0/predictions.csv",
         "fold-1/predictions.csv", "predictions.csv", "fold-1/val_predictions.csv")  # fmt: skip

Train = Callable[..., tuple[list[int], list[str]]]


@pytest.fixture(scope="module")
def train(
    cohort: Any,
    settings: tuple[str, ...],
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Train]:
    """Two processes over one run folder; their exit codes, and what they said.

    `late` is the process that comes late everywhere, `kill` the "function:call" at which the first
    one is killed.
    """
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        cwd=tmp_path_factory.mktemp("nursery"),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert nursery.stdin is not None
    assert nursery.stdout is not None

    def run(out: Path, late: int | None = None, kill: str = "") -> tuple[list[int], list[str]]:
        argv = ["train", *cohort.arguments, *settings, *SETTINGS, "--out", str(out)]
        said = tmp_path_factory.mktemp("said") / "process-"
        told = {"argv": argv, "late": late, "seconds": 0.5, "kill": kill, "said": str(said)}
        print(json.dumps(told), file=nursery.stdin, flush=True)
        codes = json.loads(nursery.stdout.readline())  # type: ignore[union-attr]
        return codes, [said.with_name(f"process-{rank}").read_text() for rank in range(2)]

    yield run
    nursery.stdin.close()
    nursery.wait()


@pytest.fixture(scope="module")
def undisturbed(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    codes, said = train(out)
    assert codes == [0, 0], said
    return {name: (out / name).read_bytes() for name in FILES}


@pytest.fixture(
    scope="module",
    params=[("write_predictions:1", "fold-0"), ("train_epoch:5", "fold-1")],
    ids=["at the end of a fold", "within the second fold"],
)
def killed(
    train: Train, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """A run whose first process was killed."""
    kill, left = request.param
    out: Path = tmp_path_factory.mktemp("killed") / "run"
    codes, said = train(out, kill=kill)
    assert codes == [-signal.SIGKILL, 2]
    assert "process 1 of 2 timed out waiting for the others" in said[1]
    assert [path.parent.name for path in out.glob("fold-*/last.safetensors")] == [left]
    return out


@pytest.mark.parametrize("late", [0, 1])
def test_a_late_process_changes_nothing(
    train: Train, undisturbed: dict[str, bytes], killed: Path, tmp_path: Path, late: int
) -> None:
    out = shutil.copytree(killed, tmp_path / "run")
    codes, said = train(out, late)
    assert codes == [0, 0], said
    for name, wanted in undisturbed.items():
        assert (out / name).read_bytes() == wanted, name
    assert not list(out.glob("fold-*/last.safetensors"))


MEETING = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch
from hmil_fast.errors import HmilError
from hmil_fast.training import distributed

with distributed.process_group(torch.device("cpu")):
    got = distributed.broadcast({"rank": distributed.rank(), "inf": float("inf")}, {
        "a.b": torch.arange(6).reshape(2, 3).to(torch.bfloat16), "step": torch.tensor(7.0),
        "none": torch.empty(0, 3)})
    assert got[0] == {"rank": 0, "inf": float("inf")}, got
    assert got[1]["a.b"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (got[1]["step"].shape, got[1]["none"].shape) == ((), (0, 3))
distributed.PATIENCE = timedelta(seconds=5)
try:
    with distributed._together():
        if distributed.rank() != 1:
            distributed.wait_for_all()
        while not Path(sys.argv[1]).exists():
            time.sleep(0.1)
except HmilError as error:
    print(error, flush=True)
    if distributed.rank() == 0:
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
    assert "process 0 of 3 timed out waiting for the others" in said
    assert "Ranks 1 failed" in said
    assert "the same command resumes" in said
