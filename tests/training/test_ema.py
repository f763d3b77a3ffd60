"""The moving average of the weights, and the learning rate over a training."""

from collections.abc import Callable
from dataclasses import replace
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.config import Runtime
from hmil_fast.recipe import PRESETS
from hmil_fast.training.ema import Ema
from hmil_fast.training.fold import FoldTrainer
from hmil_fast.training.lr_schedule import lr_factor


def test_the_average_is_the_weighted_mean_of_all_steps() -> None:
    model = torch.nn.Linear(3, 2).double()
    average = Ema(model, 0.9)
    seen = []
    for step in range(1, 6):
        torch.nn.init.normal_(model.weight)
        average.update()
        seen.append(model.weight.detach().clone())
        weights = [0.9 ** (step - 1 - i) for i in range(step)]
        wanted = sum(w * v for w, v in zip(weights, seen, strict=True)) / sum(weights)
        torch.testing.assert_close(average.model.weight, wanted)
        assert torch.equal(model.weight, seen[-1])
    assert not any(p.requires_grad for p in average.model.parameters())
    assert Ema(model, 0.0).model is model


def test_the_rate_rises_falls_and_ends_at_zero() -> None:
    best = replace(PRESETS["best"], lr_schedule="cosine", warmup=0.2)
    at = (0.0, 0.1, 0.2, 0.5, 1.0)
    wanted = [0.0, 0.5 * (1 + cos(0.1 * pi)) / 2, (1 + cos(0.2 * pi)) / 2, 0.5, 0.0]
    assert [lr_factor(best, done) for done in at] == pytest.approx(wanted)
    constant = replace(best, lr_schedule="constant")
    assert [lr_factor(constant, done) for done in at] == pytest.approx([0, 0.5, 1, 1, 1])
    assert [lr_factor(PRESETS["paper"], done) for done in at] == [1.0] * 5


def test_the_averaged_weights_are_validated_and_saved_and_the_rate_is_set(
    tmp_path: Path, cohort: Any, train_small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_small(tmp_path / "run", folds=2, epochs=3, ema=0.9, batch_bags=3)
    cache = FeatureCache(cohort.store, [s.slide_id for s in run.slides], tmp_path)
    saved = load_file(run.fold_path(0) / "best.safetensors")
    (run.fold_path(0) / "predictions.csv").unlink()
    with (run.path / "log.jsonl").open("a") as log:
        one = FoldTrainer(run, 0, cache, Runtime("cpu"), log)
        rates, averages = [], {}
        step = one.train_step

        def note(*arguments: Any) -> None:
            rates.append(one.optimizer.param_groups[0]["lr"])
            step(*arguments)

        monkeypatch.setattr(one, "train_step", note)

        def keep(report: Any) -> None:
            if not report.last:
                state = one.average.model.state_dict()
                averages[report.epoch] = {k: v.clone() for k, v in state.items()}

        one.train([], keep)
    kept = averages[one.best["epoch"]]
    assert saved.keys() == {f"model.{name}" for name in kept}
    assert all(torch.equal(saved[f"model.{name}"], value) for name, value in kept.items())
    steps = len(rates) // 3
    done = [(i + 0.5) / (3 * steps) for i in range(len(rates))]
    wanted = [run.config.recipe.lr * lr_factor(PRESETS["best"], share) for share in done]
    assert rates == pytest.approx(wanted)
    assert rates[0] < max(rates) > rates[-1]
