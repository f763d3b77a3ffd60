"""Predicting, evaluating elsewhere, drawing and reporting from a finished run."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.splits import Slide, write_splits
from hmil_fast.cli.main import main
from hmil_fast.errors import StoreError, UsageError
from hmil_fast.evaluation.evaluate import evaluate_cohort
from hmil_fast.evaluation.predict import load_fold, predict_slides, slide_attention
from hmil_fast.io.store import StoreSpec, create_store
from hmil_fast.metrics.conformal import answer_nodes, node_scores, threshold
from hmil_fast.report.heatmap import draw_heatmap
from hmil_fast.runs.predictions import read_predictions
from hmil_fast.runs.run import open_run

NODES = ["p0_benign", "p0_malignant", "p1_N", "p1_PB", "p1_DCIS", "p1_IC"]


def table(text: str) -> dict[str, dict[str, str]]:
    return {row["slide_id"]: row for row in csv.DictReader(io.StringIO(text))}


def numbers(row: dict[str, str]) -> list[float]:
    return [float(row[name]) for name in NODES]


@pytest.fixture(scope="module")
def other(cohort: Any, fill: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A store of the same encoder with six slides that the run has never seen."""
    store = create_store(tmp_path_factory.mktemp("other") / "store", cohort.store.spec)
    slides = {f"new{i}": (i % 4, 30 + i) for i in range(5)} | {"new[/b]empty": (0, 0)}
    fill(store, slides)
    return store


def as_predicted(run: Any, logits: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Probabilities per level [B, K]: a parent has the evidence of its best leaf."""
    assert run.sums
    evidence = logits[-1].softmax(1).numpy()  # the loss weighs leaves alike
    family = np.eye(run.tree.num_classes[0])[list(run.tree.parents[0])]
    best = np.max(evidence[:, :, None] * family, axis=1)
    coarse = best / best.sum(1, keepdims=True)
    return [coarse, (coarse @ family.T) * evidence / (evidence @ family @ family.T)]


@pytest.mark.slow
def test_a_slide_of_the_run_is_predicted_by_the_fold_that_tested_it(
    run: Any, cohort: Any, hmil: Callable[..., Any]
) -> None:
    said = hmil("predict", run.path, "--store", cohort.path / "store")
    assert said.returncode == 0, said.stderr
    assert said.stderr == ""
    now, then = table(said.stdout), table((run.path / "predictions.csv").read_text())
    assert now.keys() == then.keys() == cohort.slides.keys()
    for slide_id, row in then.items():
        assert now[slide_id]["fold"] == row["fold"]
        # other bags share its batch, so sums are rounded otherwise
        np.testing.assert_allclose(numbers(now[slide_id]), numbers(row), atol=1e-5)


def test_slides_that_only_taught_the_run_are_counted(
    run: Any, cohort: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_run(run.path)
    one = opened.folds[0]
    shutil.copytree(run.path, tmp_path / "run")
    write_splits(tmp_path / "run" / "splits.json", [one], opened.slides)
    command = ["predict", str(tmp_path / "run"), "--store", str(cohort.path / "store")]
    assert main([*command, *one.test]) == 0
    assert capsys.readouterr().err == ""
    assert main([*command, one.train[0], one.val[0], *one.test]) == 0
    assert "2 of these slides were used to train the run" in capsys.readouterr().err


def test_a_new_slide_is_predicted_by_the_mean_of_the_folds(run: Any, other: Any) -> None:
    opened = open_run(run.path)
    cache = FeatureCache(other, other.slide_ids(), run.path)
    for index, prediction in enumerate(predict_slides(opened, cache)):
        assert (prediction.fold, prediction.label) == (-1, "")
        x, bags = cache.batch([index], torch.device("cpu"))
        with torch.inference_mode():
            folds = [load_fold(opened, f, torch.device("cpu"))(x, bags).logits for f in range(3)]
        for level, found in enumerate(prediction.probabilities):
            mean = np.mean([as_predicted(opened, logits)[level] for logits in folds], axis=0)[0]
            np.testing.assert_allclose(found, mean, atol=1e-6)


def test_predict_answers_with_the_deepest_node_that_meets_a_risk(
    run: Any, other: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(run.path), "--store", str(other.path), "--alpha"]
    opened = open_run(run.path)
    tested = read_predictions(run.path / "predictions.csv", opened.tree)
    y = np.array([opened.tree.leaf(p.label) for p in tested])
    p = np.stack([p.probabilities[-1] for p in tested])
    cells = {}
    for asked in ("0.2", "0.01"):  # 36 slides can promise the first only
        assert main([*command, asked]) == 0
        rows = table(capsys.readouterr().out)
        limit = threshold(node_scores(opened.tree, y, p), float(asked))
        new = np.array([[float(row[n]) for n in NODES[2:]] for row in rows.values()])
        levels, nodes = answer_nodes(opened.tree, new, limit)
        for row, level, node in zip(rows.values(), levels, nodes, strict=True):
            assert int(row["level"]) == level
            assert row["node"] == (opened.tree.names[level][node] if level >= 0 else "")
            assert row["prediction"] in row["leaves"].split("|")
        cells[asked] = rows
    assert {row["node"] for row in cells["0.01"].values()} == {""}
    assert {row["leaves"] for row in cells["0.01"].values()} == {"N|PB|DCIS|IC"}
    assert any(row["level"] == "1" for row in cells["0.2"].values())


def test_predict_writes_a_file_and_names_what_it_cannot_do(
    run: Any, cohort: Any, other: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(run.path), "--store"]
    out = tmp_path / "predictions.csv"
    assert main([*command, str(other.path), "new1", "new[/b]empty", "--out", str(out)]) == 0
    rows = table(out.read_text())
    assert list(rows) == ["new1", "new[/b]empty"]
    assert rows["new[/b]empty"]["num_tiles"] == "0"
    assert np.isfinite(numbers(rows["new[/b]empty"])).all()

    assert main([*command, str(other.path), "nosuch"]) == 2
    assert "nosuch" in capsys.readouterr().err
    assert main([*command, str(other.path), "--out", str(tmp_path / "no" / "where.csv")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert main([*command, str(tmp_path)]) == 2
    assert main(["predict", str(tmp_path), "--store", str(other.path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["dim", "tiling", "encoder"])
def test_features_that_mean_something_else_are_refused(
    run: Any,
    cohort: Any,
    fill: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    spec = cohort.store.spec
    specs = {
        "dim": StoreSpec(8, spec.dtype, spec.encoder, spec.tiling),
        "tiling": StoreSpec(spec.dim, spec.dtype, spec.encoder, {**spec.tiling, "mpp": 1.0}),
        "encoder": StoreSpec(
            spec.dim, spec.dtype, {**spec.encoder, "weights_sha256": "1" * 64}, spec.tiling
        ),
    }
    store = create_store(tmp_path / "store", specs[change])
    fill(store, {"a": (0, 20)})
    labels = tmp_path / "labels.csv"
    labels.write_text("slide_id,label\na,N\n")
    path = str(store.path)
    for command in (
        ["predict", str(run.path), "--store", path],
        ["evaluate", str(run.path), "--store", path, "--labels", str(labels)],
        ["heatmap", str(run.path), "a", "--store", path, "--out", str(tmp_path / "a.png")],
    ):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert "was trained on" in err
        assert "Fix: extract these slides with the run's --encoder" in err
    assert not (tmp_path / "a.png").exists()


def test_another_cohort_is_evaluated_and_the_runs_own_slides_are_refused(
    run: Any, cohort: Any, other: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run.path / "metrics.json").read_bytes()
    labels = tmp_path / "labels.csv"
    rows = [f"new{i},{('N', 'PB', 'DCIS', 'IC')[i % 4]}" for i in range(5)]
    labels.write_text("\n".join(["slide_id,label", *rows, "lost[/b],N", "new[/b]empty,N"]))
    command = ["evaluate", str(run.path), "--labels", str(labels), "--store"]
    assert main([*command, str(other.path)]) == 0
    said = capsys.readouterr()
    assert "6 slides of 6 patients" in said.out
    assert "1 labelled slides are not in the store: lost[/b]" in said.err
    assert "have no tissue tiles, their bags are empty: new[/b]empty" in said.err
    assert (run.path / "metrics.json").read_bytes() == before

    labels.write_text("slide_id,label\ns00,N\ns01,PB\n")
    assert main([*command, str(cohort.path / "store")]) == 2
    assert "2 slides were used to train" in capsys.readouterr().err
    labels.write_text("slide_id,label,patient_id\nnew0,N,P3\nnew1,PB,Q\n")
    assert main([*command, str(other.path)]) == 2
    said = capsys.readouterr().err
    assert "1 patients were used to train" in said
    assert "'P3' among them" in said
    labels.write_text("slide_id,label,case\nnew0.svs,N,p3 \nnew1,PB,p3\n")  # however written
    assert main([*command, str(other.path)]) == 2
    said = capsys.readouterr().err
    assert "1 patients were used to train" in said
    assert "make the ids differ if they are other people" in said
    labels.write_text("slide_id,label,case\nnew0.svs,N,other p3\nnew1,PB,other p3\n")
    assert main([*command, str(other.path)]) == 0
    assert main(["evaluate", str(run.path), "--labels", str(labels)]) == 2
    assert "needs --store and --labels" in capsys.readouterr().err


def test_the_planted_signal_is_found_in_another_cohort(
    run: Any, cohort: Any, fill: Callable[..., None], tmp_path: Path
) -> None:
    store = create_store(tmp_path / "store", cohort.store.spec)
    slides = {f"x{i}": (i % 4, 30) for i in range(12)}
    fill(store, slides)
    leaves = open_run(run.path).tree.leaves
    known = [Slide(s, leaves[leaf], s) for s, (leaf, _) in slides.items()]
    metrics = evaluate_cohort(
        open_run(run.path), FeatureCache(store, list(slides), tmp_path), known
    )
    assert metrics["pooled"]["levels"]["1"]["balanced_accuracy"]["value"] > 0.85


def test_validation_predictions_are_those_of_the_best_weights_and_made_anew_from_the_store(
    run: Any, cohort: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    opened = open_run(tmp_path / "run")
    before = opened.val_path(1).read_bytes()
    rows = table(before.decode())
    assert tuple(rows) == opened.folds[1].val
    cache = FeatureCache(cohort.store, list(rows), tmp_path)
    x, bags = cache.batch([0], torch.device("cpu"))
    with torch.inference_mode():
        logits = load_fold(opened, 1, torch.device("cpu"))(x.float(), bags).logits
    want = np.concatenate([level[0] for level in as_predicted(opened, logits)])
    np.testing.assert_allclose(numbers(next(iter(rows.values()))), want, atol=1e-5)

    opened.val_path(1).unlink()
    assert main(["evaluate", str(opened.path)]) == 0
    assert "conformal" not in json.loads((opened.path / "metrics.json").read_text())
    store = ["--store", str(cohort.path / "store"), "--alpha", "0.3"]
    assert main(["evaluate", str(opened.path), *store]) == 0
    assert "conformal coverage, alpha 0.3" in capsys.readouterr().out
    assert json.loads((opened.path / "metrics.json").read_text())["conformal"]["risk"] == 0.3
    for row, again in zip(
        rows.values(), table(opened.val_path(1).read_text()).values(), strict=True
    ):
        np.testing.assert_allclose(numbers(row), numbers(again), atol=1e-6)


@pytest.mark.parametrize("slide_id", ["s00", "s06"])
def test_attention_is_that_of_the_forward_that_predicts(
    run: Any, cohort: Any, slide_id: str
) -> None:
    opened = open_run(run.path)
    cache = FeatureCache(cohort.store, ["s01", slide_id], run.path)
    prediction, levels = slide_attention(opened, cache, slide_id)
    fold = next(i for i, f in enumerate(opened.folds) if slide_id in f.test)
    model = load_fold(opened, fold, torch.device("cpu")).double()
    x, bags = cache.batch([1], torch.device("cpu"))
    with torch.inference_mode():
        output = model.forward_unfolded(x.double(), bags)
    assert prediction.fold == fold
    for level, attention in enumerate(levels):
        assert attention.shape == (cache.lengths[1], (2, 4)[level])
        np.testing.assert_allclose(attention.sum(0), 1, atol=1e-6)
        wanted = output.attention_logits[level].softmax(0).numpy()
        np.testing.assert_allclose(attention, wanted, atol=1e-5)
        wanted = as_predicted(opened, output.logits)[level][0]
        np.testing.assert_allclose(prediction.probabilities[level], wanted, atol=1e-5)


def test_heatmaps_are_drawn_for_all_nodes_or_the_named(
    run: Any, cohort: Any, other: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["heatmap", str(run.path)]
    store = ["--store", str(cohort.path / "store"), "--out"]
    assert main([*command, "s06", *store, str(tmp_path / "below" / "all.png")]) == 0
    out = capsys.readouterr().out
    row = table((run.path / "predictions.csv").read_text())["s06"]
    assert re.search(rf"s06: .*{row['prediction']} {max(map(float, numbers(row)[2:])):.2f}", out)
    assert main([*command, "s06", *store, str(tmp_path / "one.png"), "--node", "IC"]) == 0
    ranks = [*command, "s06", *store, str(tmp_path / "one-ranks.png"), "--node", "IC"]
    assert main([*ranks, "--scale", "rank"]) == 0
    shown = [(tmp_path / n).read_bytes() for n in ("one.png", "one-ranks.png")]
    assert shown[0] != shown[1]
    (tmp_path / "one-ranks.png").unlink()
    sizes = [Image.open(tmp_path / n).size for n in ("below/all.png", "one.png")]
    assert sizes[0][0] * sizes[0][1] > sizes[1][0] * sizes[1][1]
    new = ["--store", str(other.path), "--out", str(tmp_path / "new.png")]
    assert main([*command, "new1", *new]) == 0
    capsys.readouterr()

    assert main([*command, "s06", *store, str(tmp_path / "x.png"), "--node", "ADH"]) == 2
    assert "no node is called 'ADH'\nFix: name some of DCIS, IC" in capsys.readouterr().err
    assert main([*command, "nosuch", *store, str(tmp_path / "x.png")]) == 2
    assert "'nosuch' is not in the store" in capsys.readouterr().err
    assert main([*command, "s05", *store, str(tmp_path / "x.png")]) == 2
    assert "'s05' has no tissue tiles" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([*command, "s06", *store, str(tmp_path / "file" / "x.png")]) == 2
    assert "cannot write" in capsys.readouterr().err
    baseline = ["heatmap", str(run.path / "baseline"), "s06", *store, str(tmp_path / "x.png")]
    assert main(baseline) == 2
    assert "the model 'mean'" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.glob("*.p*")) == ["new.png", "one.png"]


def test_the_report_makes_the_views_that_are_missing(
    run: Any, cohort: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    command = ["report", str(tmp_path / "run")]
    store = ["--store", str(cohort.path / "store"), "--heatmaps", "3"]
    assert main([*command, *store]) == 0
    assert "report.html" in capsys.readouterr().out
    views = tmp_path / "run" / "views"
    made = {p: p.stat().st_mtime_ns for p in views.iterdir()}
    assert len(made) == 3
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count('class="look"') == 3
    assert "s35" in page
    # one of another forward is made anew
    first = min(made)
    view = json.loads(first.read_text())
    first.write_text(json.dumps(view | {"probabilities": [[0.5, 0.5], [0.25] * 4]}))
    # and one without a colour scale, as earlier versions wrote them
    old = sorted(made)[-1]
    old.write_text(old.read_text().replace('"limit"', '"unlimited"'))
    capsys.readouterr()
    assert main([*command, "--store", str(cohort.path / "store")]) == 0
    assert json.loads(first.read_text())["probabilities"] == view["probabilities"]
    assert "limit" in json.loads(old.read_text())
    now = {p: p.stat().st_mtime_ns for p in views.iterdir()}
    assert len(now) == 36 - 1
    assert {p: t for p, t in made.items() if p not in (first, old)}.items() <= now.items()
    assert "not shown, with no tissue tiles: s05" in capsys.readouterr().err


def test_a_run_that_is_not_finished_says_so(
    run: Any, cohort: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    for name in ("predictions.csv", "metrics.json", "fold-2/predictions.csv"):
        (tmp_path / "run" / name).unlink()
    for command in (["evaluate"], ["report"], ["predict", "--store", str(cohort.path / "store")]):
        assert main([command[0], str(tmp_path / "run"), *command[1:]]) == 2
        err = capsys.readouterr().err
        assert "hmil-fast train` " in err
        assert "Traceback" not in err


def test_damaged_features_are_told_in_words(
    run: Any, cohort: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cohort.path / "store", tmp_path / "store")
    chunk = next((tmp_path / "store" / "slides" / "s03").glob("a-*/features/c/0/0"))
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    assert main(["predict", str(run.path), "--store", str(tmp_path / "store")]) == 2
    assert "s03" in capsys.readouterr().err
    with pytest.raises((StoreError, UsageError)):
        draw_heatmap(
            open_run(run.path),
            create_store(tmp_path / "store", cohort.store.spec),
            "s03",
            tmp_path / "x.png",
        )
    assert json.loads((run.path / "metrics.json").read_text())


def test_pictures_that_cannot_be_made_are_refused(run: Any, cohort: Any, tmp_path: Path) -> None:
    opened = open_run(run.path)
    with pytest.raises(UsageError, match="would be a PNG"):
        draw_heatmap(opened, cohort.store, "s00", tmp_path / "a.jpg")
    (tmp_path / "else.svs").write_bytes(b"")
    command = ["report", str(run.path), "--slides", str(tmp_path / "else.svs")]
    assert main(command) == 2
    assert main([*command, "--store", str(cohort.path / "store")]) == 2
