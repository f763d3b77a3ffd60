"""One path per slide under every prior, operating points, and another cohort's folder."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hmil_fast.cli.main import main
from hmil_fast.evaluation.prior import current_prior, read_prior, under_prior
from hmil_fast.io.store import create_store
from hmil_fast.runs.predictions import read_predictions
from hmil_fast.runs.run import open_run

PARENT = {"N": "benign", "PB": "benign", "DCIS": "malignant", "IC": "malignant"}
NODES = {"0": ("benign", "malignant"), "1": tuple(PARENT)}


@pytest.fixture
def copied(run: Any, tmp_path: Path) -> Path:
    shutil.copytree(run.path, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def other(cohort: Any, fill: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A store of the same encoder with sixteen slides that the run has never seen."""
    store = create_store(tmp_path_factory.mktemp("other") / "store", cohort.store.spec)
    fill(store, {f"new{i:02d}": (i % 4, 30 + i) for i in range(16)})
    return store


def rows_of(text: str) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rows
    return rows


def check_row(row: dict[str, str]) -> None:
    """The row is one path: answers, printed probabilities and the answer at a risk agree."""
    p = {level: np.array([float(row[f"p{level}_{n}"]) for n in NODES[level]]) for level in NODES}
    assert p["0"] == pytest.approx([p["1"][:2].sum(), p["1"][2:].sum()], abs=1e-6)
    coarse, leaf = row["prediction_0"], row["prediction"]
    assert PARENT[leaf] == coarse == NODES["0"][p["0"].argmax()]
    likeliest = NODES["1"][p["1"].argmax()]
    assert row["likelier_elsewhere"] == ("" if likeliest == leaf else likeliest)
    if "node" in row:
        assert row["node"] in ("", coarse, leaf)
        assert leaf in row["leaves"].split("|")


def test_every_row_is_one_path_under_every_prior(
    copied: Path, cohort: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skewed = tmp_path / "prior.csv"
    skewed.write_text("label,share\nbenign,90\nDCIS,1\nIC,9\n")
    command = ["predict", str(copied), "--store", str(cohort.path / "store"), "--alpha", "0.2"]
    answers = []
    for prior in ("balanced", "cohort", str(skewed)):
        assert main([*command, "--prior", prior]) == 0
        rows = rows_of(capsys.readouterr().out)
        for row in rows:
            check_row(row)
        answers.append([row["prediction"] for row in rows])
    assert answers[0] != answers[2]
    assert sum(PARENT[a] == "benign" for a in answers[2]) > sum(
        PARENT[a] == "benign" for a in answers[0]
    )


def test_the_prior_and_the_risk_of_the_last_evaluation_stay(
    copied: Path, cohort: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(copied)
    assert current_prior(run).name == "balanced"
    assert main(["evaluate", str(copied), "--prior", "cohort", "--alpha", "0.3"]) == 0
    metrics = json.loads((copied / "metrics.json").read_text())
    want = {leaf: sum(s.label == leaf for s in run.slides) / len(run.slides) for leaf in PARENT}
    assert metrics["prior"] == {"name": "cohort", "leaves": pytest.approx(want)}
    assert metrics["conformal"]["risk"] == 0.3
    before = (copied / "predictions.csv").read_text()
    capsys.readouterr()
    store = str(cohort.path / "store")
    assert main(["predict", str(copied), "--store", store]) == 0
    now = {row["slide_id"]: row for row in rows_of(capsys.readouterr().out)}
    for row in rows_of(before):
        check_row(row)
        assert float(now[row["slide_id"]]["p1_IC"]) == pytest.approx(float(row["p1_IC"]), abs=1e-4)
    assert main(["evaluate", str(copied)]) == 0  # no word: as last time
    again = json.loads((copied / "metrics.json").read_text())
    assert again == metrics
    assert main(["report", str(copied), "--prior", "balanced"]) == 0
    assert current_prior(run).name == "balanced"
    assert "balanced" in (copied / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("label,share\nnosuch,1\n", "line 2: label 'nosuch'"),
        ("label,share\nN,-1\n", "the share is '-1'"),
        ("label,share\nN,many\n", "the share is 'many'"),
        ("label,share\nN,0\n", "are 0"),
        ("label;share\n", "no rows with the columns label,share"),
        (None, "there is no prior"),
    ],
)
def test_a_prior_that_cannot_be_used_is_refused(
    copied: Path, tmp_path: Path, text: str | None, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prior.csv"
    if text is not None:
        path.write_text(text)
    before = (copied / "metrics.json").read_bytes()
    assert main(["evaluate", str(copied), "--prior", str(path)]) == 2
    assert what in capsys.readouterr().err
    assert (copied / "metrics.json").read_bytes() == before
    path.write_text("label,share\nN,1\nmalignant,3\n")  # as the fix says
    assert main(["evaluate", str(copied), "--prior", str(path)]) == 0
    assert read_prior(open_run(copied), str(path)).leaves == (0.25, 0.0, 0.375, 0.375)


def test_an_operating_point_is_chosen_on_validation_slides(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(copied), "--json", "--sensitivity"]
    assert main([*command, "0.8", "--of", "malignant"]) == 0
    found = json.loads(capsys.readouterr().out)["operating"]
    run = open_run(copied)
    hits: list[tuple[bool, bool]] = []
    for fold in range(len(run.folds)):
        val = read_predictions(run.val_path(fold), run.tree)
        scores = sorted(p.probabilities[0][1] for p in val if PARENT[p.label] == "malignant")
        limit = found["thresholds"][fold]
        assert min(abs(s - limit) for s in scores) < 1e-8
        assert np.mean([s >= limit - 1e-8 for s in scores]) >= 0.8
        assert np.mean([s > limit + 1e-8 for s in scores]) < 0.8
        test = read_predictions(run.fold_path(fold) / "predictions.csv", run.tree)
        hits += [(p.probabilities[0][1] >= limit, PARENT[p.label] == "malignant") for p in test]
    called, sick = np.array(hits).T
    assert found["sensitivity"]["value"] == pytest.approx(called[sick].mean())
    assert found["specificity"]["value"] == pytest.approx(1 - called[~sick].mean())
    assert found["sensitivity"]["low"] <= found["sensitivity"]["value"]
    assert main(["report", str(copied)]) == 0
    assert "Operating point of malignant" in (copied / "report.html").read_text()
    assert main([*command, "0.8"]) == 2
    assert "needs --sensitivity and --of" in capsys.readouterr().err
    assert main([*command, "0.8", "--of", "nosuch"]) == 2
    assert "give --of benign, malignant, N" in capsys.readouterr().err


def test_another_cohort_gets_what_a_run_gets(
    copied: Path, other: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a label is coarse: it counts on the level that it names."""
    labels, out = tmp_path / "labels.csv", tmp_path / "elsewhere"
    leaves = list(PARENT)
    fine = {f"new{i:02d}": leaves[i % 4] for i in range(16)}
    told = {s: PARENT[leaf] if i % 4 == 3 else leaf for i, (s, leaf) in enumerate(fine.items())}
    labels.write_text("slide_id,label\n" + "".join(f"{s},{label}\n" for s, label in told.items()))
    command = ["evaluate", str(copied), "--store", str(other.path), "--labels", str(labels)]
    command += ["--out", str(out), "--json", "--sensitivity", "0.9", "--of", "malignant"]
    assert main(command) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert {p.name for p in out.iterdir()} == {
        "conformal.csv", "metrics.json", "predictions.csv", "report.html", "tree.json",
    }  # fmt: skip
    pooled = metrics["pooled"]
    assert (np.sum(pooled["confusion"]["0"]), np.sum(pooled["confusion"]["1"])) == (16, 12)
    rows = rows_of((out / "predictions.csv").read_text())
    for row in rows:
        check_row(row)
        assert row["label"] == told[row["slide_id"]]
    right = np.mean([row["prediction_0"] == PARENT[fine[row["slide_id"]]] for row in rows])
    assert pooled["levels"]["0"]["accuracy"]["value"] == pytest.approx(right)
    assert pooled["levels"]["0"]["accuracy"]["low"] is not None
    assert {"calibration", "conformal", "operating"} <= metrics.keys()
    page = (out / "report.html").read_text()
    assert "new15" in page
    assert "malignant" in page

    said = "slide_id,label\n" + "".join(f"{s},{PARENT[leaf]}\n" for s, leaf in fine.items())
    labels.write_text(said)  # no leaf at all
    assert main(command) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["pooled"]["levels"]["1"] == {}
    assert "conformal" not in metrics
    assert "operating" in metrics
    assert not (out / "conformal.csv").exists()
    assert main([*command[:-4], "--out", str(copied)]) == 2
    assert "is a run folder" in capsys.readouterr().err


def test_a_change_of_prior_and_back_changes_nothing(run: Any) -> None:
    opened = open_run(run.path)
    told = read_predictions(opened.fold_path(0) / "predictions.csv", opened.tree)
    again = under_prior(opened.tree, told, read_prior(opened, "balanced"))
    for a, b in zip(told, again, strict=True):
        np.testing.assert_allclose(
            a.probabilities[-1], b.probabilities[-1], rtol=1e-8
        )  # as many digits as a file has


def test_evaluate_makes_the_metrics_anew(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == run.printed.stdout
    assert (tmp_path / "run" / "metrics.json").read_bytes() == (
        run.path / "metrics.json"
    ).read_bytes()
    (tmp_path / "run" / "metrics.json").write_text("{")
    assert main(["report", str(tmp_path / "run")]) == 2
    assert "metrics.json" in capsys.readouterr().err
