"""The report: complete, self-contained, harmless, and alive in a browser."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import evaluate_predictions
from hmil_fast.training.report import write_report

TREE = LabelTree.from_nested({"benign": ["N", r"_$\frac$"], "<i>malignant": ["IC", "{{title}}"]})
HOSTILE = "</script><img src=x onerror=document.title='owned'>\"'&{{title}}"
VOID = {"meta", "img", "line", "circle", "br"}


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
    levels = [np.stack([p[:, :2].sum(1), p[:, 2:].sum(1)], 1), p]
    ids = [HOSTILE, *(f"slide {i}" for i in range(1, 24))]
    patients = [f"P{i // 2}" for i in range(24)]
    fold = np.arange(24) // 2 % folds
    (run / "heatmaps").mkdir(parents=True)
    (run / "tree.json").write_text(json.dumps(TREE.to_dict()))
    pooled = evaluate_predictions(TREE, y, levels, patients, draws=50)
    metrics = {"model": "hmil", "pooled": pooled, "folds": []}
    for f in range(folds):
        mine = np.flatnonzero(fold == f)
        owners = [patients[i] for i in mine]
        metrics["folds"].append(
            evaluate_predictions(TREE, y[mine], [q[mine] for q in levels], owners, draws=0)
        )
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
            guess = TREE.leaves[p[i].argmax()]
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
    picture = Image.effect_noise((900, 600), 60).convert("RGB")
    picture.save(run / "heatmaps" / f"{quote(HOSTILE, safe='')}.png")
    return run


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert [s["id"] for s in page.all("section")] == [
        "results", "folds", "levels", "training", "slides", "config",
    ]  # fmt: skip
    sources = [a["src"] for a in page.all("img") if "src" in a]
    assert sources
    assert all(s and s.startswith("data:image/") for s in sources)
    assert all((a["href"] or "").startswith("#") for a in page.all("a"))
    assert not page.all("link")
    assert not re.search(r"url\(|@import|https?:", text.split("<main>")[0])
    # 3 charts per level, the curves, one small heatmap
    assert len(sources) == 3 * 2 + 1 + 1
    assert {p.name for p in path.parent.iterdir()} >= {"report.html"}
    assert not list(path.parent.glob("*.new"))


def test_names_stay_text(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8"))
    assert len(page.all("script")) == 1
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
    shutil.rmtree(run / "heatmaps")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert [s["id"] for s in page.all("section")] == ["results", "levels", "slides"]
    assert not any(b.get("class") == "look" for b in page.all("button"))


def test_a_damaged_heatmap_costs_its_picture_only(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "heatmaps" / "slide%201.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    assert "unreadable" in write_report(run).read_text(encoding="utf-8")


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


def browse(page: Path, tmp_path: Path, fragment: str) -> tuple[str, str]:
    """The page's document after its script has run, and what the browser logged."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("neither chromium nor google-chrome is installed")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom",
            page.as_uri() + fragment,
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


def column(document: str, number: int) -> list[str]:
    body = (
        document.split('id="slide-table"')[1].split("<tbody>")[1].split("</tbody>", maxsplit=1)[0]
    )
    return [re.findall(r"<td[^>]*>(.*?)</td>", row)[number] for row in body.split("<tr")[1:]]


def test_the_table_sorts_in_a_browser(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run"))
    as_written, log = browse(path, tmp_path, "")
    tiles = [int(v) for v in column(as_written, 6)]
    assert tiles == sorted(tiles, reverse=True)
    assert "CONSOLE" not in log
    assert "owned" not in as_written.split("<title>")[1].split("</title>")[0]

    by_tiles, log = browse(path, tmp_path, "#sort-6")
    assert [int(v) for v in column(by_tiles, 6)] == tiles[::-1]
    assert 'aria-sort="ascending"' in by_tiles
    assert "CONSOLE" not in log
