"""Run folders of made-up predictions, whose names a test chooses."""

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hmil_fast.labels import LabelTree
from hmil_fast.metrics import all_levels, decide, evaluate_predictions
from hmil_fast.report.html.data import view_file


@pytest.fixture(scope="session")
def made_up_run() -> Callable[..., Path]:
    """`make_up_run`: a run folder that is as quick to make as to write."""
    return make_up_run


def make_up_run(
    run: Path, tree: LabelTree, slide_id: str, folds: int = 2, baseline: bool = True
) -> Path:
    """A run folder of 24 slides with made-up predictions, for a tree of four leaves.

    The first slide is called `slide_id` and has a view.
    """
    rng = np.random.default_rng(0)
    y = np.arange(24) % 4
    p = rng.dirichlet(np.ones(4), 24) + 0.4 * np.eye(4)[y]
    p /= p.sum(axis=1, keepdims=True)
    levels, answers = all_levels(tree, p), decide(tree, p).nodes
    ids = [slide_id, *(f"slide {i}" for i in range(1, 24))]
    patients = [f"P{i // 2}" for i in range(24)]
    fold = np.arange(24) // 2 % folds
    (run / "views").mkdir(parents=True)
    (run / "tree.json").write_text(json.dumps(tree.to_dict()))
    pooled = evaluate_predictions(tree, y, p, patients, draws=50)
    metrics = {"model": "hmil", "pooled": pooled, "folds": []}
    for f in range(folds):
        mine = np.flatnonzero(fold == f)
        owners = [patients[i] for i in mine]
        metrics["folds"].append(evaluate_predictions(tree, y[mine], p[mine], owners, draws=0))
    if baseline:
        metrics["baseline"] = {"model": "mean<b>", "pooled": pooled}
    (run / "metrics.json").write_text(json.dumps(metrics))
    with (run / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [
            f"p{level}_{n}" for level, level_names in enumerate(tree.names) for n in level_names
        ]
        writer.writerow(
            ["slide_id", "patient_id", "fold", "label", "prediction", "num_tiles", *names]
        )
        for i in range(24):
            guess = tree.leaves[answers[-1, i]]
            writer.writerow(
                [ids[i], patients[i], fold[i], tree.leaves[y[i]], guess, 1000 - 37 * i]
                + [float(q) for level in levels for q in level[i]]
            )
    lines = [
        {"event": "epoch", "fold": f, "epoch": e, "loss": 2 / (e + 1), "terms": {"ce": 1.0},
         "val_loss": 1.0, "val_balanced_accuracy": 0.5, "seconds": 1.0}
        for f in range(folds) for e in range(3)
    ]  # fmt: skip
    text = "\n".join(json.dumps(line) for line in [{"event": "start"}, *lines])
    (run / "log.jsonl").write_text(text + '\n{"event": "epo')
    (run / "config.yaml").write_text("epochs: 3\nnote: </pre><script>alert(1)</script>\n")
    write_made_up_view(run, slide_id, [[float(q) for q in level[0]] for level in levels])
    return run


def write_made_up_view(run: Path, slide_id: str, probabilities: list[list[float]]) -> None:
    """A view of four tiles and one map."""
    file = io.BytesIO()
    Image.effect_noise((90, 60), 60).convert("RGB").save(file, "WEBP")
    picture = base64.b64encode(file.getvalue()).decode()
    corners = np.array([[0, 0], [100, 0], [0, 100], [100, 100]], "<u2")
    view = {
        "slide_id": slide_id, "probabilities": probabilities, "size": [900, 600], "mpp": 0.5,
        "side": 100.0, "tiles": 4, "picture": picture, "small": picture, "limit": 8.0, "unit": 1.0,
        "cells": base64.b64encode(corners.tobytes()).decode(), "cell_side": 100.0, "cut": True,
        "cuts": {}, "note": "</script><b>",
        "maps": [{"level": 1, "node": 0, "spread": "", "places": dict.fromkeys(
            ("share", "rank"), base64.b64encode(b"\x00\x40\xfe\xff").decode()),
                  "top": [[2, 0, 100, 0.75]]}],
    }  # fmt: skip
    view_file(run, slide_id).write_text(json.dumps(view))
