"""The report: complete, self-contained and harmless; test_report_browser.py has it in use."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree
from hmil_fast.report.html.data import read_view, view_file
from hmil_fast.report.html.levels import confusion_of
from hmil_fast.report.html.page import write_report

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


@pytest.fixture
def make_run(made_up_run: Callable[..., Path]) -> Callable[..., Path]:
    return partial(made_up_run, tree=TREE, slide_id=HOSTILE)


def test_the_page_is_whole_and_fetches_nothing(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
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


def test_names_stay_text(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    page = Page(write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8"))
    scripts = page.all("script")
    assert [s.get("type") for s in scripts] == ["application/json", "application/json", None]
    assert not any(key.startswith("on") for _, attrs in page.found for key in attrs)
    texts = "".join(page.texts)
    for name in (HOSTILE, *TREE.leaves, "mean<b>", "</pre><script>alert(1)</script>"):
        assert name in texts


NAMES = (
    "<script>document.title='owned'</script>", "</script><svg onload=alert(1)>",
    "\"' onmouseover=alert(1) x=\"", "&lt;b&gt; --><!--<script> &amp;",
    "{{ 7 * 7 }}{% raw %}{# config #}", "\u202eseman\u202c \u2028 \u2029 \u200f ]]>`${1}`",
)  # fmt: skip


def test_no_name_becomes_markup(tmp_path: Path, made_up_run: Callable[..., Path]) -> None:
    every, leaves = " ".join(NAMES), NAMES[:4]
    tree = LabelTree.from_nested({NAMES[4]: [*leaves[:2]], NAMES[5]: [*leaves[2:]]})
    run = made_up_run(tmp_path / every.replace("/", "-"), tree, every)
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"model": every}))
    text = write_report(run).read_text(encoding="utf-8")
    plain_tree = LabelTree.from_nested({"up": ["a", "b"], "other": ["c", "d"]})
    plain = write_report(made_up_run(tmp_path / "run", plain_tree, "s")).read_text("utf-8")
    page, plain_page = Page(text), Page(plain)
    # the same elements with the same attributes as of plain names
    elements = [[(tag, [*attrs]) for tag, attrs in p.found] for p in (page, plain_page)]
    assert elements[0] == elements[1]
    texts = "".join(page.texts)
    for shown in (*NAMES, every, f"hmil-fast: {run.name}"):
        assert shown in texts
    assert every in [row.get("data-slide") for row in page.all("tr")]
    islands = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
    assert json.loads(islands[0])["names"] == [list(level) for level in tree.names]
    assert json.loads(islands[1])["slide_id"] == every
    assert not re.search("[<&\u2028\u2029]", "".join(islands))


def test_every_number_is_there(tmp_path: Path, make_run: Callable[..., Path]) -> None:
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


def test_the_needed_files_are_enough(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    run = make_run(tmp_path / "run", folds=1, baseline=False)
    for name in ("log.jsonl", "config.yaml"):
        (run / name).unlink()
    shutil.rmtree(run / "views")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert [s["id"] for s in page.all("section")] == ["results", "levels", "slides"]
    assert not any(b.get("class") == "look" for b in page.all("button"))


def test_a_view_that_is_damaged_or_of_another_forward_is_left_out(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
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


def test_what_else_metrics_hold_is_shown_and_not_missed(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
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
        assert "<h3>Calibration" not in write_report(run).read_text(encoding="utf-8")


def test_the_confusion_matrix_counts_rows_of_true_and_columns_of_predicted_classes() -> None:
    y, predicted = np.array([0, 0, 0, 1, 2]), np.array([0, 1, 1, 1, 0])
    confusion = confusion_of(y, predicted, ["N", "<IC>", "X"], [0, 0, 1])
    assert [[cell.slides for cell in row] for row in confusion.rows] == [
        [1, 2, 0], [0, 1, 0], [1, 0, 0],
    ]  # fmt: skip
    assert confusion.rows[0][1].share == pytest.approx(2 / 3)
    # lines between the parents, not between sisters
    assert confusion.cut == [False, False, True]


def test_the_page_shows_the_confusion_matrix(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    html = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    page = Page(html)
    cells = [b for b in page.all("button") if b.get("data-level") == "1"]
    counts = re.findall(r'data-level="1"[^>]*>(\d+)</button>', html)
    assert sum(map(int, counts)) == 24
    for cell in cells:
        true, said = (TREE.leaves[int(cell[key] or 0)] for key in ("data-true", "data-predicted"))
        assert re.fullmatch(
            rf"{re.escape(true)}, predicted {re.escape(said)}: \d+% of the row", cell["title"] or ""
        )
    marks = [row.get("class") for row in page.all("tr")]
    assert [mark for mark in marks if mark in ("predicted", "cut-top")] == [
        "predicted",
        "predicted",
        "cut-top",
    ]


@pytest.mark.parametrize("name", ["tree.json", "metrics.json", "predictions.csv"])
@pytest.mark.parametrize("content", [None, "", "[]", "{", "\x00"])
def test_missing_and_damaged_files_are_named(
    tmp_path: Path, make_run: Callable[..., Path], name: str, content: str | None
) -> None:
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    with pytest.raises(UsageError, match=re.escape(name)) as caught:
        write_report(run)
    assert "evaluate" in caught.value.fix
    assert not (run / "report.html").exists()


def test_a_bad_row_is_named_by_line(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    run = make_run(tmp_path / "run")
    path = run / "predictions.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    fields = lines[3].split(",")
    path.write_text("\n".join([*lines[:3], ",".join([*fields[:-1], "much"]), *lines[4:]]))
    with pytest.raises(UsageError, match=r"line 4: .*much"):
        write_report(run)
