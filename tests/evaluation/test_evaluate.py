"""Evaluating and comparing runs whose predictions were drawn from known probabilities."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hmil_fast.api.evaluate import compare
from hmil_fast.bags.splits import Fold, Slide
from hmil_fast.cli.main import main
from hmil_fast.config import load_config
from hmil_fast.errors import UsageError
from hmil_fast.evaluation.evaluate import EvaluationOptions, evaluate_run
from hmil_fast.evaluation.tables import in_order, metric_rows
from hmil_fast.io.store import StoreSpec, create_store
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import all_levels, calibration_scores, fit_temperature, with_temperature
from hmil_fast.runs.predictions import (
    Prediction,
    read_predictions,
    run_predictions,
    stack_leaves,
    write_predictions,
)
from hmil_fast.runs.run import Run, create_run

TREE = LabelTree.from_nested({"benign": ["N", "PB"], "malignant": ["DCIS", "IC"]})
SPEC = StoreSpec(4, "float16", {"name": "none"}, {"tile_px": 64})


def cohort(n: int, prefix: str = "s") -> list[Slide]:
    """Slides of every leaf in turn, two of a patient."""
    return [
        Slide(f"{prefix}{i}", TREE.leaves[i % 4], f"{prefix}P{i // 8}-{i % 4}") for i in range(n)
    ]


def answer(slide: Slide, fold: int, signal: float, seed: int, sharp: float = 1.0) -> Prediction:
    """Probabilities that favour the slide's leaf; `sharp` ones claim more than they hold."""
    rng = np.random.default_rng([seed, *slide.slide_id.encode()])
    z = sharp * (rng.normal(size=4) + signal * np.eye(4)[TREE.leaf(slide.label)])
    p = np.exp(z - z.max())[None]
    p /= p.sum()
    levels = tuple(level[0] for level in all_levels(TREE, p))
    head = rng.dirichlet([1.0, 1.0])
    return Prediction(slide.slide_id, slide.patient_id, fold, slide.label, 9, levels, (head,))


def make_run(
    path: Path,
    slides: list[Slide],
    signal: float,
    seed: int = 0,
    sharp: float = 1.0,
    validation: bool = True,
    **settings: Any,
) -> Run:
    """A finished two-fold run: a third of the slides is tested in each fold, a third held out."""
    store = path.parent / f"{path.name}-store"
    words = [f"{name}={value}" for name, value in settings.items()]
    config = load_config(None, ["baseline=none", "coarse=sum", *words])
    # by patient, as a split must be
    owners = list(dict.fromkeys(s.patient_id for s in slides))
    part = {owner: i % 3 for i, owner in enumerate(owners)}
    parts = [[s for s in slides if part[s.patient_id] == k] for k in range(3)]
    ids = [tuple(s.slide_id for s in p) for p in parts]
    folds = [Fold(ids[2], ids[1], ids[0]), Fold(ids[0], ids[2], ids[1])]
    run = create_run(path, config, TREE, (folds, slides), create_store(store, SPEC))
    everything = []
    for fold, (test, held_out) in enumerate(((parts[0], parts[1]), (parts[1], parts[2]))):
        run.fold_path(fold).mkdir(exist_ok=True)
        (run.fold_path(fold) / "best.safetensors").touch()
        said = [answer(s, fold, signal, seed, sharp) for s in test]
        write_predictions(run.fold_path(fold) / "predictions.csv", TREE, said, heads=True)
        everything += said
        if validation:
            said = [answer(s, fold, signal, seed, sharp) for s in held_out]
            write_predictions(run.val_path(fold), TREE, said, heads=True)
    write_predictions(run.path / "predictions.csv", TREE, everything)
    return run


def test_a_surely_wrong_model_is_mended_by_the_temperature_of_its_validation(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run", cohort(240), signal=1.0, sharp=4.0)
    metrics = evaluate_run(run)
    found = metrics["calibration"]
    assert found["slides"] == [80, 80]
    truths, mended = [], []
    for fold in range(2):
        held_out = read_predictions(run.val_path(fold), TREE)
        y = np.array([TREE.leaf(p.label) for p in held_out])
        want = fit_temperature(y, stack_leaves(held_out, TREE))
        assert found["temperature"][fold] == pytest.approx(want)
        assert want > 2
        tested = [p for p in read_predictions(run.path / "predictions.csv", TREE) if p.fold == fold]
        truths += [TREE.leaf(p.label) for p in tested]
        mended.append(with_temperature(stack_leaves(tested, TREE), want))
    leaf = found["levels"]["1"]
    assert leaf["before"]["ece"] == pytest.approx(metrics["pooled"]["levels"]["1"]["ece"]["value"])
    assert leaf["after"]["ece"] < leaf["before"]["ece"] / 2
    assert leaf["after"]["nll"] < leaf["before"]["nll"]
    p = np.concatenate(mended)
    assert leaf["after"] == pytest.approx(calibration_scores(np.array(truths), p))
    coarse = calibration_scores(TREE.ancestors()[0][truths], all_levels(TREE, p)[0])
    assert found["levels"]["0"]["after"] == pytest.approx(coarse)
    assert json.loads((run.path / "metrics.json").read_text()) == metrics


def test_conformal_answers_are_written_and_add_up(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", cohort(240), signal=1.5)
    found = evaluate_run(run, EvaluationOptions(alpha=0.2))["conformal"]
    assert (found["risk"], found["needed"], found["slides"]) == (0.2, 4, [80, 80])
    with (run.path / "conformal.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 160
    for kind in ("node", "lac", "aps"):
        assert found[kind]["coverage"]["value"] > 0.72
        assert found[kind]["coverage"]["low"] < found[kind]["coverage"]["value"]
    below = {"": set(TREE.leaves), "benign": {"N", "PB"}, "malignant": {"DCIS", "IC"}}
    right = [row["label"] in below.get(row["node"], {row["node"]}) for row in rows]
    assert [row["right"] == "1" for row in rows] == right
    assert np.mean(right) == pytest.approx(found["node"]["coverage"]["value"])
    sizes = [len(row["lac"].split("|")) for row in rows]
    assert np.mean(sizes) == pytest.approx(found["lac"]["mean_size"]["value"])
    assert np.mean([row["label"] in row["aps"].split("|") for row in rows]) == pytest.approx(
        found["aps"]["coverage"]["value"]
    )
    depth = {"": 0, "benign": 1, "malignant": 1}
    depths = [depth.get(row["node"], 2) for row in rows]
    assert {str(d): depths.count(d) for d in range(3)} == found["node"]["depths"]
    assert sum(leaf["slides"] for leaf in found["leaves"].values()) == 160


def test_too_few_validation_slides_answer_with_the_root_and_say_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", cohort(24), signal=3.0)
    found = evaluate_run(run, EvaluationOptions(alpha=0.1))["conformal"]
    assert found["note"].startswith("2 of 2 folds have fewer than the 9 validation slides")
    assert found["node"]["root_share"]["value"] == 1
    assert found["node"]["mean_depth"]["value"] == 0
    assert found["lac"]["mean_size"]["value"] == 4


def test_without_validation_predictions_the_rest_is_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", cohort(24), signal=3.0, validation=False)
    metrics = evaluate_run(run)
    assert not {"calibration", "conformal"} & metrics.keys()
    _, rows = metric_rows(metrics)
    assert not [row for row in rows if "temperature" in row[0]]
    assert [row for row in rows if row[0] == "coarse sensitivity (malignant)"]


def test_disagreement_of_heads_is_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", cohort(60), signal=2.0)
    got = evaluate_run(run)["pooled"]["tree"]
    predictions = run_predictions(run)
    heads = np.array([p.heads[0].argmax() for p in predictions])
    answers = np.array([p.probabilities[0].argmax() for p in predictions])
    assert got["head_against_answer_0"]["value"] == pytest.approx((heads != answers).mean())


def test_a_kappa_is_shown_for_grades_only() -> None:
    assert in_order(["ISUP 0", "ISUP 1", "ISUP 3"])
    assert in_order(["0", "1", "2", "10"])
    assert not in_order(["0", "2", "1"])
    assert not in_order(["N", "PB", "IC"])
    assert not in_order(["0", "1"])


def test_runs_are_compared_in_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slides = cohort(240)
    runs = [
        make_run(tmp_path / name, slides, signal, seed=seed, **more)
        for name, signal, seed, more in (
            ("a", 1.0, 1, {}), ("b", 3.0, 2, {"preset": "released"}), ("c", 1.0, 3, {}),
        )
    ]  # fmt: skip
    command = ["compare", *(str(run.path) for run in runs), "--resamples", "300"]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["slides"], said["patients"], len(said["comparisons"])) == (160, 80, 2)
    better, alike = (c["metrics"]["1/balanced_accuracy"] for c in said["comparisons"])
    for test, run in ((better, runs[1]), (alike, runs[2])):
        for side, of in (("first", runs[0]), ("second", run)):
            want = evaluate_run(of)["pooled"]["levels"]["1"]["balanced_accuracy"]["value"]
            assert test[side] == pytest.approx(want)
    assert better["low"] > 0
    tested = [(name, c["p"], c["p_holm"]) for c in said["comparisons"]
              for name, c in c["metrics"].items()]  # fmt: skip
    assert {name.split("/")[1] for name, _, corrected in tested if corrected is not None} == {
        "auc", "balanced_accuracy", "macro_f1", "hierarchical_f1", "mean_tree_distance",
    }  # fmt: skip
    family = [(p, corrected) for _, p, corrected in tested if corrected is not None]
    assert len(family) == 16
    assert min(family)[1] == pytest.approx(16 * min(family)[0])
    assert alike["low"] < 0 < alike["high"]
    assert alike["p"] > 0.05

    only = ["--metric", "balanced_accuracy", "--metric", "hierarchical_f1"]
    assert main([*command, *only]) == 0
    out = capsys.readouterr().out
    assert "leaf balanced accuracy" in out
    assert "*" in next(line for line in out.splitlines() if "hierarchical F1" in line)
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if "│" in line}
    assert "leaf AUC" not in lines
    assert "–" not in lines["leaf balanced accuracy"]
    assert "not another training run" in out
    assert main([*command, "--metric", "f2"]) == 2
    assert "no metric f2\nFix: choose among accuracy" in capsys.readouterr().err


def test_a_run_is_not_compared_with_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", cohort(24), 1.0)
    with pytest.raises(UsageError, match="a run is named twice"):
        compare([run, tmp_path / "a" / ".." / "a"])


def test_runs_that_cannot_be_paired_are_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", cohort(24), 1.0)
    other = make_run(tmp_path / "b", cohort(24, "x"), 1.0)
    with pytest.raises(UsageError, match=r"16 slides were tested by .*a and not by .*b: s0, s1"):
        compare([run, other.path])
    moved = [dataclasses.replace(s, label="PB") if s.slide_id == "s0" else s for s in cohort(24)]
    other = make_run(tmp_path / "c", moved, 1.0)
    with pytest.raises(UsageError, match=r"1 slides have another label in .*: s0"):
        compare([run, other.path])
    with pytest.raises(UsageError, match="not a run folder"):
        compare([run, tmp_path])
    tree = LabelTree.from_nested({"other": ["N", "PB"], "malignant": ["DCIS", "IC"]})
    (other.path / "tree.json").write_text(json.dumps(tree.to_dict()))
    with pytest.raises(UsageError, match="other label trees"):
        compare([run, other.path])


def test_slides_tested_twice_are_paired_by_fold(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, cohort(48), 1.0 + seed, seed) for seed, name in enumerate("ab")
    ]
    for run in runs:
        said = read_predictions(run.path / "predictions.csv", TREE)
        again = [answer(s, 1, 1.0, 7) for s in run.slides if s.slide_id in run.folds[0].test]
        write_predictions(run.path / "predictions.csv", TREE, [*said, *again])
    result = compare(runs, resamples=20)
    assert (result["slides"], result["patients"]) == (48, 16)
