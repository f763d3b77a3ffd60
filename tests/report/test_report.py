"""The report: complete, self-contained and harmless; test_report_browser.py has it in use."""

import base64
import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import all_levels, decide, evaluate_predictions
from hmil_fast.report.html.data import read_run, read_view, view_file
from hmil_fast.report.html.levels import confusion_table
from hmil_fast.report.html.page import write_report
from hmil_fast.report.html.trust import trust_section

TREE = LabelTree.from_nested({"benign": ["N", r"_$\frac$"], "<i>malignant": ["IC", "{{title}}"]})
HOSTILE = "</script><img src=x onerror=document.title='owned'>\"'&{{title}}"
VOID = {"meta", "img", "line", "circle", "br", "input"}


class Page(HTMLParser):
    """Tags, attributes and texts of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


def make_run(run: Path, folds: int = 2, baseline: bool = True) -> Path:
    """A run folder of 24 slides with made-up predictions."""
    rng = np.random.default_rng(0)
    y = np.arange(24) % 4
    p = rng.dirichlet(np.ones(4), 24) + 0.4 * np.eye(4)[y]
    p /= p.sum(axis=1, keepdims=True)
    levels, answers = all_levels(TREE, p), decide(TREE, p).nodes
    ids = [HOSTILE, *(f"slide {i}" for i in range(1, 24))]
    patients = [f"P{i // 2}" for i in range(24)]
    fold = np.arange(24) // 2 % folds
    (run / "views").mkdir(parents=True)
    (run / "tree.json").write_text(json.dumps(TREE.to_dict()))
    pooled = evaluate_predictions(TREE, y, p, patients, draws=50)
    metrics = {"model": "hmil", "pooled": pooled, "folds": []}
    for f in range(folds):
        mine = np.flatnonzero(fold == f)
        owners = [patients[i] for i in mine]
        metrics["folds"].append(evaluate_predictions(TREE, y[mine], p[mine], owners, draws=0))
    if baseline:
        metrics["baseline"] = {"model": "mean<b>", "pooled": pooled}
    (run / "metrics.json").write_text(json.dumps(metrics))
    with (run / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [
            f"p{level}_{n}" for level, level_names in enumerate(TREE.names) for n in level_names
        ]
        writer.writerow(
            ["slide_id", "patient_id", "fold", "label", "prediction", "num_tiles", *names]
        )
        for i in range(24):
            guess = TREE.leaves[answers[-1, i]]
            writer.writerow(
                [ids[i], patients[i], fold[i], TREE.leaves[y[i]], guess, 1000 - 37 * i]
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
    write_made_up_view(run, HOSTILE, [[float(q) for q in level[0]] for level in levels])
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


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert [s["id"] for s in page.all("section")] == [
        "results", "folds", "levels", "slides", "training", "config",
    ]  # fmt: skip
    sources = [a["src"] for a in page.all("img") if "src" in a]
    assert sources
    assert all(s and s.startswith("data:image/") for s in sources)
    assert all((a["href"] or "").startswith("#") for a in page.all("a"))
    assert not page.all("link")
    assert not re.search(r"url\(|@import|https?:", text.split("<main>")[0])
    assert len(sources) == 1
    # ROC and reliability per level, the curves
    assert len([a for a in page.all("svg") if a.get("role") == "img"]) == 2 * 2 + 1
    assert {p.name for p in path.parent.iterdir()} >= {"report.html"}
    assert not list(path.parent.glob("*.new"))


def test_names_stay_text(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8"))
    scripts = page.all("script")
    assert [s.get("type") for s in scripts] == ["application/json", "application/json", None]
    assert not any(key.startswith("on") for _, attrs in page.found for key in attrs)
    texts = "".join(page.texts)
    for name in (HOSTILE, *TREE.leaves, "mean<b>", "</pre><script>alert(1)</script>"):
        assert name in texts


def test_every_number_is_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    texts = "".join(Page(write_report(run).read_text(encoding="utf-8")).texts)
    pooled = json.loads((run / "metrics.json").read_text())["pooled"]
    for cell in (
        pooled["levels"]["0"]["auc"],
        pooled["levels"]["1"]["balanced_accuracy"],
        pooled["levels"]["1"]["macro_f1"],
        pooled["tree"]["hierarchical_f1"],
    ):
        assert f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" in texts
    with (run / "predictions.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            assert f"{float(row['p1_' + row['prediction']]):.3f}{row['num_tiles']}" in texts


def test_the_needed_files_are_enough(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", folds=1, baseline=False)
    for name in ("log.jsonl", "config.yaml"):
        (run / name).unlink()
    shutil.rmtree(run / "views")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert [s["id"] for s in page.all("section")] == ["results", "levels", "slides"]
    assert not any(b.get("class") == "look" for b in page.all("button"))


def test_a_view_that_is_damaged_or_of_another_forward_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = view_file(run, HOSTILE)
    view = json.loads(path.read_text())
    said = [np.array(level) for level in view["probabilities"]]
    assert read_view(path, said) == view
    assert read_view(path, [said[0][::-1], said[1]]) is None
    for change in ({"picture": 3}, {"maps": None}, {"probabilities": [[1]]}, {"probabilities": 1}):
        path.write_text(json.dumps(view | change))
        assert read_view(path, said) is None
    for text in ("", "[]", "{", "{}", "\x00"):
        path.write_text(text)
        assert read_view(path, said) is None
    assert 'class="look"' not in write_report(run).read_text(encoding="utf-8")


def test_what_else_metrics_hold_is_shown_and_not_missed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    cell = {"value": 0.9125, "low": 0.8, "high": 0.97, "undefined": 0}
    kind = {"coverage": cell, "mean_size": cell, "single_share": cell}
    scores = {"ece": 0.25, "ece_adaptive": 0.2, "brier": 0.5, "nll": 1.5}
    metrics["pooled"]["tree"]["head_against_answer_0"] = {**cell, "value": 0.0625}
    metrics["calibration"] = {
        "slides": [7, 8],
        "temperature": [1.5, 2.25],
        "levels": {"1": {"before": scores, "after": {"ece": 0.125}}},
    }
    metrics["conformal"] = {
        "risk": 0.1, "note": "<few>", "node": {"coverage": cell, "depths": {"0": 1, "2": 3}},
        "lac": kind, "leaves": {"N": {"slides": 6, "node": 0.5, "lac": 0.25}},
    }  # fmt: skip
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "conformal.csv").write_text("slide_id,fold,node\nslide 1,0,benign\nslide 2,1,\n")
    texts = "".join(Page(write_report(run).read_text(encoding="utf-8")).texts)
    for text in ("0.250 → 0.125", "1.500 → –", "1.50, 2.25", "0.912", "90 % of the slides",
                 "<few>", "1 slide at the root", "3 slides at a leaf", "prefers another node",
                 "0.062", "Sure of"):  # fmt: skip
        assert text in texts, text
    for broken in ({"calibration": None, "conformal": {}}, {"calibration": {"levels": {"0": {}}}}):
        (run / "metrics.json").write_text(json.dumps(metrics | broken))
        assert "<h3>Calibration" not in trust_section(read_run(run))


def test_the_confusion_matrix_counts_rows_of_true_and_columns_of_predicted_classes() -> None:
    y, predicted = np.array([0, 0, 0, 1, 2]), np.array([0, 1, 1, 1, 0])
    html = confusion_table(y, predicted, ["N", "<IC>", "X"], 1, [0, 0, 1])
    page = Page(html)
    cells = {(b["data-true"], b["data-said"]): b["title"] for b in page.all("button")}
    assert set(cells) == {("0", "0"), ("0", "1"), ("1", "1"), ("2", "0")}
    assert cells["0", "1"] == "N, predicted <IC>: 67% of the row"
    assert re.findall(r">(\d+)</button>", html) == ["1", "2", "1", "1"]
    # lines between the parents, not between sisters
    assert [t.get("class") for t in page.all("tr")[1:]] == [None, None, "cut-top"]


@pytest.mark.parametrize("name", ["tree.json", "metrics.json", "predictions.csv"])
@pytest.mark.parametrize("content", [None, "", "[]", "{", "\x00"])
def test_missing_and_damaged_files_are_named(
    tmp_path: Path, name: str, content: str | None
) -> None:
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    with pytest.raises(UsageError, match=re.escape(name)) as caught:
        write_report(run)
    assert "evaluate" in caught.value.fix
    assert not (run / "report.html").exists()


def test_a_bad_row_is_named_by_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run / "predictions.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    fields = lines[3].split(",")
    path.write_text("\n".join([*lines[:3], ",".join([*fields[:-1], "much"]), *lines[4:]]))
    with pytest.raises(UsageError, match=r"line 4: .*much"):
        write_report(run)
