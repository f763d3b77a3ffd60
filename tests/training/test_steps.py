"""A training killed or stopped at any step ends as one that was never touched."""

import json
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.cli.main import main
from hmil_fast.config import Runtime
from hmil_fast.errors import Stopped, UsageError
from hmil_fast.models.hmil import HMIL
from hmil_fast.runs.predictions import read_predictions
from hmil_fast.runs.run import open_run
from hmil_fast.training import fold as module
from hmil_fast.training.fold import FoldTrainer
from hmil_fast.training.loop import train_run

SETTINGS = ("folds=2", "epochs=5", "batch_bags=3", "baseline=none", "dropout=0.25", "balance=leaf")
# saves after every step, as a large cohort does every few
DRIVER = """
import sys
import hmil_fast.io.slide
from hmil_fast.training import fold
from hmil_fast.cli.main import main
fold.SAVE_EVERY_S = 0.0
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def start_saving(start_python: Callable[..., Any]) -> Callable[..., Any]:
    return partial(start_python, "-c", DRIVER)


def position(path: Path) -> tuple[int, int]:
    """Epoch and step of a checkpoint; (-1, -1) if there is none."""
    if not path.exists():
        return -1, -1
    data = path.read_bytes()  # opened once: the next save may take its place meanwhile
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    state = json.loads(header["__metadata__"]["state"])
    return state["epoch"], state["step"]


@pytest.mark.slow
def test_killed_at_any_step_it_ends_bit_for_bit_the_same(
    cohort: Any,
    start_saving: Callable[..., Any],
    settings: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # as the processes below have it
    command = ["train", *cohort.arguments, *settings, *SETTINGS, "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    whole = capsys.readouterr().out
    out = tmp_path / "run"
    last = out / "fold-0" / "last.safetensors"
    draw = np.random.default_rng(0)
    reached = (-1, -1)
    inside = 0
    for kill in (signal.SIGKILL, signal.SIGTERM):
        process = start_saving(*command, out)
        goal = (max(reached[0], 0) + 1, int(draw.integers(1, 6)))
        deadline = time.monotonic() + 600
        while position(last) < goal:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(kill)
        process.communicate(timeout=600)
        assert process.returncode == (-9 if kill == signal.SIGKILL else 143)
        reached = position(last)
        inside += reached[1] > 0
    assert inside  # at least one was in the midst of an epoch
    (out / "fold-0" / "last.77.partial").write_bytes(b"half a checkpoint")
    finished = start_saving(*command, out)
    printed, err = finished.communicate(timeout=600)
    assert finished.returncode == 0, err
    assert printed == whole
    for fold in ("fold-0", "fold-1"):
        name = f"{fold}/best.safetensors"
        ours, theirs = load_file(out / name), load_file(tmp_path / "whole" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for name in ("predictions.csv", "metrics.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not [*out.rglob("*.partial"), *out.rglob("last.safetensors")]

    def losses(run: Path) -> dict[tuple[int, int], Any]:
        records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
        return {
            (r["fold"], r["epoch"]): (r["terms"], r["val_loss"])
            for r in records
            if r["event"] == "epoch"
        }

    assert losses(out) == losses(tmp_path / "whole")


def trainer(run: Any, cohort: Any, path: Path) -> FoldTrainer:
    cache = FeatureCache(cohort.store, [s.slide_id for s in run.slides], path)
    log = (run.path / "log.jsonl").open("a")
    return FoldTrainer(run, 0, cache, Runtime("cpu"), log)


def test_a_stop_ends_the_running_step_and_keeps_everything(
    tmp_path: Path, cohort: Any, train_small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_small(tmp_path / "run", epochs=1, folds=2, batch_bags=3)
    (run.fold_path(0) / "predictions.csv").unlink()
    stopped: list[int] = []
    one = trainer(run, cohort, tmp_path)
    step = one.train_step

    def stop_in_the_second(*arguments: Any) -> None:
        step(*arguments)
        if one.step == 1:
            stopped.append(signal.SIGTERM)

    monkeypatch.setattr(one, "train_step", stop_in_the_second)
    with pytest.raises(Stopped):
        one.train(stopped, lambda report: None)
    assert (one.epoch, one.step) == (0, 2)
    again = trainer(run, cohort, tmp_path)
    assert (again.epoch, again.step, again.best) == (one.epoch, one.step, one.best)
    assert again._sums == one._sums
    assert again.average.steps == one.average.steps == 2
    moments = [each.optimizer.state_dict()["state"] for each in (again, one)]
    assert moments[0].keys() == moments[1].keys()
    for ours, theirs in (
        (again.model.state_dict(), one.model.state_dict()),
        (again.loss.state_dict(), one.loss.state_dict()),
        (again.average.model.state_dict(), one.average.model.state_dict()),
        *((moments[0][i], moments[1][i]) for i in moments[0]),
    ):
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0, msg=key)


def test_it_saves_from_time_to_time_within_an_epoch(
    tmp_path: Path, cohort: Any, train_small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_small(tmp_path / "run", epochs=1, folds=2, batch_bags=3)
    one = trainer(run, cohort, tmp_path)
    saved: list[tuple[int, int]] = []
    monkeypatch.setattr(one, "_save", lambda name, **_: saved.append((one.epoch, one.step)))
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.0)
    steps = -(-len(one.train_bags) // 3)
    one.train_epoch([])
    assert saved == [(0, step) for step in range(1, steps)]
    monkeypatch.setattr(module, "SAVE_EVERY_S", 60.0)
    saved.clear()
    one.epoch, one.step = 1, 0
    one.train_epoch([])
    assert saved == []


def test_one_run_has_one_training_at_a_time(
    tmp_path: Path, cohort: Any, train_small: Callable[..., Any]
) -> None:
    run = train_small(tmp_path / "run", epochs=1, folds=2)
    (run.fold_path(1) / "predictions.csv").unlink()
    cache = FeatureCache(cohort.store, [s.slide_id for s in run.slides], tmp_path)
    refused: list[str] = []

    def meanwhile(report: Any) -> None:
        def other() -> None:  # a lock is of the open file, so a thread stands for a process
            try:
                train_run(run, cache, lambda report: None)
            except UsageError as error:
                refused.append(error.what)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    train_run(run, cache, meanwhile)
    assert set(refused) == {f"another process trains the run {run.path}"}


def test_overwrite_sets_the_old_run_aside(
    cohort: Any, settings: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    short = [*cohort.arguments, *settings, "baseline=none", "epochs=1", "folds=2", "--out"]
    assert main(["train", *short, str(out)]) == 0
    before = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert main(["train", *short, str(out), "seed=5"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["train", *short, str(out), "seed=5", "--overwrite"]) == 0
    assert open_run(out).config.seed == 5
    (old,) = tmp_path.glob("run.bak-*")
    assert {p.relative_to(old): p.read_bytes() for p in old.rglob("*") if p.is_file()} == before
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years of work")
    assert main(["train", *short, str(thesis), "--overwrite"]) == 2
    assert (thesis / "thesis.tex").read_text() == "years of work"
    assert not list(tmp_path.glob("thesis.bak*"))


def test_the_tier_and_the_device_change_no_bit(
    tmp_path: Path, train_small: Callable[..., Any]
) -> None:
    weights = [
        load_file(
            train_small(tmp_path / tier, cache=tier, epochs=2, folds=2).path
            / "fold-0"
            / "best.safetensors"
        )
        for tier in ("host", "map", "stream")
    ]
    for other in weights[1:]:
        assert all(torch.equal(other[key], weights[0][key]) for key in weights[0])
    assert Runtime().cache == "auto"


def test_leaves_are_weighed_once_by_the_sampler_or_by_the_loss(
    tmp_path: Path, cohort: Any, train_small: Callable[..., Any]
) -> None:
    for balance in ("none", "leaf"):
        run = train_small(tmp_path / balance, epochs=1, folds=2, balance=balance)
        cache = FeatureCache(cohort.store, [s.slide_id for s in run.slides], tmp_path)
        one = FoldTrainer(run, 0, cache, Runtime("cpu"), None)
        leaves = one.targets[one.train_bags, -1]
        count = torch.bincount(leaves, minlength=len(run.tree.leaves)).double()
        weights = one.loss.get_buffer("class_weights").double()
        drawn = count if balance == "none" else torch.ones_like(count)
        assert count.unique().numel() > 1
        assert (weights * drawn).unique().numel() == 1


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["host", "stream"])
def test_a_bag_larger_than_a_batch_goes_in_chunks(
    tmp_path: Path, train_small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    seen: list[int] = []
    forward = HMIL.forward_chunks

    def note(self: HMIL, chunks: Any, **options: Any) -> Any:
        seen.append(len(chunks))
        return forward(self, chunks, **options)

    monkeypatch.setattr(HMIL, "forward_chunks", note)
    common = {"epochs": 2, "folds": 2, "dropout": 0.0, "batch_bags": 1, "cache": tier}
    common |= {"instance_dropout": 0.0, "feature_dropout": 0.0}
    runs = [train_small(tmp_path / f"{n}", batch_instances=n, **common) for n in (1000, 16)]
    assert max(seen) >= (59 // 16 if tier == "host" else 1)  # whole chunks of the file
    assert len(seen) > 36
    whole, parts = (read_predictions(run.path / "predictions.csv", run.tree) for run in runs)
    for p, q in zip(parts, whole, strict=True):
        np.testing.assert_allclose(p.probabilities[-1], q.probabilities[-1], atol=1e-3)
