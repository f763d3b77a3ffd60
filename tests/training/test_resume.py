"""Stopping, killing, resuming; folders that are not ours; damage."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.cli.main import main
from hmil_fast.errors import Stopped, UsageError
from hmil_fast.evaluation.predict import load_fold
from hmil_fast.io.store import create_store
from hmil_fast.labels import LabelTree
from hmil_fast.runs.checkpoint import save_checkpoint
from hmil_fast.runs.run import create_run, open_run
from hmil_fast.training.loop import EpochReport, train_run


def wait_for_epoch(process: Any, log: Path, count: int) -> None:
    """Until the log has so many lines."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if log.exists() and log.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)
    process.kill()
    raise AssertionError(f"{log} never had {count} epochs")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_stopped_and_killed_runs_end_bitwise_as_if_nothing_had_been(
    run: Any,
    cohort: Any,
    hmil: Callable[..., Any],
    start: Callable[..., Any],
    settings: tuple[str, ...],
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    command = ("train", *cohort.arguments, "--out", out, *settings)
    first = len((run.path / "log.jsonl").read_text().split('"fold": 1')[0].splitlines()) - 1

    process = start(*command)
    wait_for_epoch(process, out / "log.jsonl", 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 143
    assert "stopped; the same command resumes" in err
    assert "Traceback" not in err
    done = (out / "log.jsonl").read_bytes().count(b"\n")
    assert (out / "fold-0" / "last.safetensors").exists()
    assert done < first  # it stopped within the first fold

    process = start(*command)  # killed later than its last checkpoint
    wait_for_epoch(process, out / "log.jsonl", done + 3)
    process.kill()
    process.communicate(timeout=600)
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    stops = [r for r in records[:done] if r["event"] == "epoch"]
    began = records[done]  # it went on where it was stopped
    assert (began["event"], began["epoch"]) == ("fold", len(stops))

    process = start(*command)  # interrupted in another fold
    deadline = time.monotonic() + 600
    while not (out / "fold-1" / "best.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=600)
    assert process.returncode == 130

    finished = hmil(*command)
    assert finished.returncode == 0, finished.stderr
    for folder in ("", "baseline"):
        for fold in range(3):
            name = f"fold-{fold}/best.safetensors"
            ours, theirs = (load_file(path / folder / name) for path in (out, run.path))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        name = "predictions.csv"
        assert (out / folder / name).read_bytes() == (run.path / folder / name).read_bytes()
    assert (out / "metrics.json").read_bytes() == (run.path / "metrics.json").read_bytes()
    assert not list(out.rglob("last.safetensors"))


def test_a_stop_in_the_last_epoch_that_patience_allows_adds_none(
    tmp_path: Path, cohort: Any, train_small: Callable[..., Any]
) -> None:
    # so that patience ends
    jumpy = {
        "lr_schedule": "constant",
        "warmup": 0.0,
        "ema": 0.0,
        "class_weights": "none",
        "lr": 0.05,
    }
    run = train_small(tmp_path / "run", folds=2, patience=2, **jumpy)
    log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    end = max(r["epoch"] for r in log if r["event"] == "epoch" and r["fold"] == 0)
    assert end < 39

    shutil.copytree(run.path, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "fold-0")
    stopped = open_run(tmp_path / "stopped")
    cache = FeatureCache(cohort.store, [s.slide_id for s in stopped.slides], tmp_path)
    seen: list[int] = []

    def note(report: EpochReport) -> None:
        seen.append(report.epoch)
        if report.epoch == end:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        train_run(stopped, cache, note)
    train_run(stopped, cache, note)
    assert seen == list(range(end + 1))
    assert (
        contents(stopped.fold_path(0))["predictions.csv"]
        == contents(run.fold_path(0))["predictions.csv"]
    )


def test_a_stop_while_the_last_slides_are_predicted_is_not_forgotten(
    tmp_path: Path, cohort: Any, train_small: Callable[..., Any]
) -> None:
    run = train_small(tmp_path / "run", folds=2, epochs=2)
    (run.path / "fold-1" / "predictions.csv").unlink()
    cache = FeatureCache(cohort.store, [s.slide_id for s in run.slides], tmp_path)

    def stop_at_the_end(report: EpochReport) -> None:
        if report.last:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        train_run(run, cache, stop_at_the_end)
    assert (run.path / "fold-1" / "predictions.csv").exists()


@pytest.mark.slow
def test_another_runs_folder_is_refused_and_left_alone(
    run: Any, cohort: Any, hmil: Callable[..., Any], settings: tuple[str, ...], tmp_path: Path
) -> None:
    before = contents(run.path)
    train = ("train", "--out", run.path)
    refused = hmil(*train, *cohort.arguments, *settings, "lr=1e-3", "seed=3")
    assert refused.returncode == 2
    assert "was set up with other settings (" in refused.stderr
    assert contents(run.path) == before


@pytest.mark.parametrize("what", ["labels", "tree", "store", "settings"])
def test_each_difference_to_the_run_is_named(
    run: Any, cohort: Any, tmp_path: Path, what: str
) -> None:
    there = open_run(run.path)
    store, config, tree, slides = cohort.store, there.config, there.tree, list(there.slides)
    if what == "labels":
        slides[0] = dataclasses.replace(slides[0], patient_id="P-other")
    elif what == "settings":
        config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, epochs=41))
    elif what == "tree":
        tree = LabelTree.from_nested({"x": ["N", "PB"], "malignant": ["DCIS", "IC"]})
    else:
        store = create_store(
            tmp_path / "store", dataclasses.replace(store.spec, tiling={"tile_px": 65})
        )
    before = contents(run.path)
    words = {"labels": "labels or splits", "tree": "label tree"}.get(what, what)
    with pytest.raises(
        UsageError, match=f"was set up with other {words}( \\((epochs|tiling).* was .*\\))?\n"
    ):
        create_run(run.path, config, tree, (there.folds, slides), store)
    assert contents(run.path) == before


def test_a_folder_that_is_no_run_is_refused_and_left_alone(
    tmp_path: Path, cohort: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("a file")
    for out, said in (
        (thesis, "exists and is not a run folder\nFix:"),
        (file, "exists and is not a run folder\nFix:"),
        (file / "below", "cannot write"),
    ):
        assert main(["train", *cohort.arguments, "--out", str(out), "folds=3"]) == 2
        assert said in capsys.readouterr().err
    assert contents(thesis) == {"thesis.tex": b"years of work"}
    assert file.read_text() == "a file"


def test_a_kill_while_the_folder_is_set_up_is_mended(run: Any, tmp_path: Path, cohort: Any) -> None:
    there = open_run(run.path)
    out = tmp_path / "run"
    out.mkdir()
    (out / "splits.json").write_text("{")
    (out / "config.yaml.77.partial").write_text("mod")
    split = (there.folds, there.slides)
    create_run(out, there.config, there.tree, split, cohort.store, precision="fp32")
    assert open_run(out) == dataclasses.replace(there, path=out)


@pytest.mark.parametrize("name", ["config.yaml", "splits.json", "tree.json", "run.json"])
@pytest.mark.parametrize("damage", [b"{", b"[1]", b"\xff\xfe", b"5"])
def test_damaged_run_folders_are_told_in_words(
    run: Any, tmp_path: Path, name: str, damage: bytes
) -> None:
    for part in ("config.yaml", "splits.json", "tree.json", "run.json"):
        shutil.copy(run.path / part, tmp_path / part)
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(UsageError, match=re.escape(str(tmp_path))):
        open_run(tmp_path)


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[9:20] = b"x" * 11
    path.write_bytes(data)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_pickle(path: Path) -> None:
    torch.save({"model": Trap()}, path)


def damage_other_model(path: Path) -> None:
    state = {"epoch": 0, "best": {}, "fingerprint": "x"}
    save_checkpoint(path, torch.nn.Linear(2, 2), state)


def damage_other_file(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path)


class Trap:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(Path(os.environ["TRAP"])),))


@pytest.mark.parametrize(
    "damage",
    [damage_cut, damage_header, damage_empty, damage_pickle, damage_other_model, damage_other_file],
)
def test_damaged_checkpoints_are_told_in_words_and_never_unpickled(
    run: Any,
    cohort: Any,
    tmp_path: Path,
    damage: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "trap"))
    shutil.copytree(run.path, tmp_path / "run")
    damage(tmp_path / "run" / "fold-0" / "best.safetensors")
    copy = open_run(tmp_path / "run")
    with pytest.raises(UsageError, match="checkpoint") as error:
        load_fold(copy, 0, torch.device("cpu"))
    other = "restore config.yaml if it was edited"  # whole, but of other parameters
    again = "delete it and run `hmil-fast train` again"
    assert (other if damage is damage_other_model else again) in error.value.fix
    assert not (tmp_path / "trap").exists()


@pytest.mark.slow
def test_the_fix_for_a_damaged_checkpoint_works(
    run: Any, cohort: Any, hmil: Callable[..., Any], settings: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run.path, out)
    damage_cut(out / "fold-1" / "best.safetensors")
    refused = hmil("predict", out, "--store", cohort.path / "store")
    assert refused.returncode == 2
    assert "fold-1/best.safetensors" in refused.stderr
    (out / "fold-1" / "best.safetensors").unlink()
    again = hmil("train", *cohort.arguments, "--out", out, *settings)
    assert again.returncode == 0, again.stderr
    assert again.stdout == run.printed.stdout
    assert (out / "fold-1/best.safetensors").exists()
    assert (out / "predictions.csv").read_bytes() == (run.path / "predictions.csv").read_bytes()


def test_every_checkpoint_is_safetensors(run: Any) -> None:
    files = [p for p in run.path.rglob("*") if p.is_file()]
    checkpoints = [p for p in files if p.suffix == ".safetensors"]
    assert len(checkpoints) == 6
    for path in files:
        data = path.read_bytes()
        assert not data.startswith((b"\x80", b"PK"))  # pickle, and the zip that torch.save writes
