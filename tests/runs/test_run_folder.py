"""The run folder: made once, renamed on --overwrite, opened as it was trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from hmil_fast.config import PRESETS
from hmil_fast.errors import UsageError
from hmil_fast.runs.archive import set_aside
from hmil_fast.runs.checkpoint import load_module
from hmil_fast.runs.lock import own_log
from hmil_fast.runs.run import create_run, open_run


@pytest.mark.parametrize("part", [".", "baseline"])
def test_a_run_that_is_trained_is_not_set_aside(tmp_path: Path, part: str) -> None:
    run = tmp_path / "run"
    (run / "baseline").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 1\n")
    with own_log(run / part / "log.jsonl"), pytest.raises(UsageError, match="another process"):
        set_aside(run)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    moved = set_aside(run)
    assert moved is not None
    assert (moved / "config.yaml").read_text() == "seed: 1\n"
    assert not run.exists()


def test_a_run_keeps_its_recipe_when_a_preset_changes(
    run: Any, cohort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_run(run.path)
    monkeypatch.setitem(PRESETS, "best", replace(PRESETS["best"], coarse="head", lr=1.0))
    again = open_run(run.path)
    assert again == before
    assert again.sums
    # the preset as it is now is another recipe
    asked = replace(again.config, recipe=replace(again.config.recipe, coarse="head"))
    with pytest.raises(UsageError, match="coarse is 'head', was 'sum'"):
        create_run(run.path, asked, again.tree, (again.folds, again.slides), cohort.store)


def test_weights_that_do_not_fit_are_not_to_be_deleted() -> None:
    with pytest.raises(UsageError) as refused:
        load_module(nn.Linear(2, 3), nn.Linear(2, 4).state_dict())
    assert "config.yaml" in refused.value.fix  # no release of before has a tag to install
    assert "delete" not in refused.value.fix
