"""Two processes of torchrun, by gloo, against one process with the same batches."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing

from hmil_fast.config import MODELS
from hmil_fast.labels import LabelTree
from hmil_fast.losses import PRESETS, HmilLoss
from hmil_fast.models import build_model
from hmil_fast.runs.predictions import read_predictions
from hmil_fast.runs.run import open_run
from hmil_fast.training import distributed

# the same batches in any number of processes; a dropped unit depends on the process
CHANGES = {
    "folds": 2, "epochs": 4, "batch_bags": 13, "dropout": 0.0, "instance_dropout": 0.0,
    "feature_dropout": 0.0, "precision": "fp32",
}  # fmt: skip
SETTINGS = ("baseline=none", *(f"{name}={value}" for name, value in CHANGES.items()))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture
def torchrun(start_python: Callable[..., Any]) -> Callable[..., Any]:
    return partial(start_python, *TORCHRUN, "--max-restarts", "0", "-m", "hmil_fast.cli")


def curve(run: Path) -> dict[tuple[int, int], dict[str, float]]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    names = ("val_loss", "val_auc", "val_balanced_accuracy")
    return {
        (r["fold"], r["epoch"]): {**r["terms"], **{name: r[name] for name in names}}
        for r in records
        if r["event"] == "epoch"
    }


@pytest.mark.slow
def test_two_processes_train_as_one_does(
    cohort: Any,
    train_small: Callable[..., Any],
    torchrun: Callable[..., Any],
    settings: tuple[str, ...],
    tmp_path: Path,
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    process = torchrun("train", *cohort.arguments, *settings, *SETTINGS, "--out", two)
    train_small(one, **CHANGES)
    printed, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert printed.count("leaf balanced accuracy") == 1  # the first process alone speaks
    sizes = [len(fold.train) % CHANGES["batch_bags"] for fold in open_run(one).folds]
    assert 1 in sizes  # one process had no bag in the last step

    ours, theirs = curve(two), curve(one)
    assert ours.keys() == theirs.keys() == {(f, e) for f in range(2) for e in range(4)}
    for key, terms in theirs.items():
        assert ours[key].keys() == terms.keys()
        for name, value in terms.items():
            assert ours[key][name] == pytest.approx(value, rel=2e-4, abs=1e-5), (key, name)
    tree = open_run(one).tree
    found = read_predictions(two / "predictions.csv", tree)
    wanted = read_predictions(one / "predictions.csv", tree)
    assert [p.slide_id for p in found] == [p.slide_id for p in wanted]
    for p, q in zip(found, wanted, strict=True):
        for a, b in zip(p.probabilities, q.probabilities, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)
    logged = [json.loads(line) for line in (two / "log.jsonl").read_text().splitlines()]
    assert [r["processes"] for r in logged if r["event"] == "fold"] == [2, 2]
    assert len(logged) == 10  # none twice
    assert not list(two.rglob("*.partial"))


TREE = LabelTree.from_nested(
    {"n": None, "p": {"micro": None, "macro": ["large", "small"], "only": ["end"]}}
)
# (instances, leaf) of the bags of each step, and those of either process
STEPS = [
    ([(7, 0), (1, 1), (30, 2), (5, 3), (3, 4)], ([0, 2], [1, 3, 4])),
    ([(4, 1)], ([], [0])),
    ([(6, 2), (2, 2), (0, 0)], ([0, 1, 2], [])),
    ([(3, 3), (0, 1), (8, 1)], ([0], [1, 2])),
]


def _gradients(name: str, preset: str, rank: int | None) -> list[list[Tensor]]:
    """Of every step: the loss, and the gradient of every parameter."""
    torch.manual_seed(0)
    sizes = TREE.num_classes
    readout = PRESETS[preset].readout
    model = build_model(name, 12, sizes, TREE.parents, hidden=8, readout=readout).double()
    loss, found = HmilLoss(TREE, preset, [3, 4, 5, 2, 1]), []
    for k, (drawn, shares) in enumerate(STEPS):
        own = range(len(drawn)) if rank is None else shares[rank]
        lengths = [n for n, _ in drawn]
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(sum(lengths), 12, generator=generator, dtype=torch.float64)
        bags = torch.tensor([[sum(lengths[:i]), lengths[i]] for i in own], dtype=torch.int64)
        leaf = torch.tensor([drawn[i][1] for i in own], dtype=torch.int64)
        targets = torch.from_numpy(TREE.ancestors()).T[leaf]
        bags, share = bags.reshape(-1, 2), len(own) / len(drawn)
        output = distributed.scale_gradients(model(x, bags, targets=targets), share)
        total = loss(output, bags, targets, k, 4).total
        model.zero_grad()
        total.backward()
        distributed.average_gradients(model.parameters())
        part = total.detach() * share if share else torch.zeros_like(total)
        grads = [p.grad.clone() for p in model.parameters()]
        found.append([distributed.dist_sum({"total": part})["total"], *grads])
    return found


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    found = {f"{m} {p}": _gradients(m, p, rank) for m in MODELS for p in PRESETS}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    torch.distributed.barrier()
    os._exit(0)  # torch's threads have been seen to abort an ordinary exit


@pytest.mark.slow
def test_every_model_and_preset_has_the_gradient_of_one_process(tmp_path: Path) -> None:
    """Uneven shares, a process without a bag, bags without an instance; in float64."""
    multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name in MODELS:
        for preset in PRESETS:
            alone = _gradients(name, preset, None)
            for step, (ours, theirs) in enumerate(
                zip(found[f"{name} {preset}"], alone, strict=True)
            ):
                for a, b in zip(ours, theirs, strict=True):
                    where = f"{name} {preset} step {step}"
                    torch.testing.assert_close(
                        a, b, rtol=1e-9, atol=1e-12, msg=lambda m, w=where: f"{w}: {m}"
                    )
