"""Exported heads and model cards of real runs, of every model."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hmil_fast.cli.main import main
from hmil_fast.errors import UsageError
from hmil_fast.evaluation import export
from hmil_fast.evaluation.model_card import fold_card, markdown, write_card
from hmil_fast.evaluation.predict import load_fold
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import all_levels, balanced_prior, leaf_probabilities
from hmil_fast.models import MODELS, build_model
from hmil_fast.models.export_form import PlainHead
from hmil_fast.runs.run import open_run

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")


@pytest.fixture(scope="module")
def heads(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All folds of the run, exported by the command; do not change them."""
    path = tmp_path_factory.mktemp("exported") / "heads"
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["export", str(run.path), "--out", str(path)]) == 0
    files = [str(path / f"fold-{fold}.onnx") for fold in range(3)]
    assert [line.split(":")[0] for line in printed.getvalue().splitlines()] == files
    assert sorted(p.suffix for p in path.iterdir()) == [".md"] * 3 + [".onnx"] * 3
    return path


@pytest.mark.slow
def test_a_file_says_what_its_model_and_predict_say(run: Any, cohort: Any, heads: Path) -> None:
    files = [heads / f"fold-{fold}.onnx" for fold in range(3)]
    with (run.path / "predictions.csv").open() as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    opened = open_run(run.path)
    sessions = [onnxruntime.InferenceSession(str(file)) for file in files]
    for slide_id in ("s00", "s07", "s20", "s31"):
        row = rows[slide_id]
        x = cohort.store.features(slide_id).astype(np.float32)
        names = [f"probabilities_{l}" for l in range(2)]
        found = sessions[int(row["fold"])].run(names, {"x": x})
        said = [float(value) for name, value in row.items() if name.startswith(("p0_", "p1_"))]
        np.testing.assert_allclose(np.concatenate(found), said, atol=0.03)  # in bf16 if it may
        model = load_fold(opened, int(row["fold"]), torch.device("cpu"))
        with torch.inference_mode():
            output = model(torch.from_numpy(x), torch.tensor([[0, len(x)]]))
        leaf = output.logits[1][0].softmax(0).numpy()  # the loss weighs leaves alike
        family = np.eye(2)[list(opened.tree.parents[0])]
        best = (leaf[:, None] * family).max(axis=0)
        above = best / best.sum()
        leaf = leaf / (leaf @ family @ family.T) * (family @ above)
        for level, wanted in zip(found, (above, leaf), strict=True):
            np.testing.assert_allclose(level, wanted, atol=1e-5)


@pytest.mark.slow
def test_a_file_holds_its_card_and_no_path_of_the_machine(run: Any, heads: Path) -> None:
    opened, file = open_run(run.path), heads / "fold-1.onnx"
    model = onnx.load(str(file))
    onnx.checker.check_model(model)
    card = json.loads(next(p.value for p in model.metadata_props if p.key == "hmil_fast"))
    assert card == fold_card(opened, 1)
    assert (heads / "fold-1.md").read_text() == markdown(card)
    raw = file.read_bytes()
    for path in (export.__file__, str(run.path), torch.__file__):
        assert str(Path(path).parent).encode() not in raw
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "x": ["n", 16],
        "logits_0": [2],
        "logits_1": [4],
        "probabilities_0": [2],
        "probabilities_1": [4],
        "attention_0": ["n", 2],
        "attention_1": ["n", 4],
    }


@pytest.mark.parametrize(
    ("name", "readout"), [*((name, "paper") for name in MODELS), ("hmil", "evidence")]
)
def test_plain_formulas_are_the_models(name: str, readout: str) -> None:
    tree = LabelTree.from_nested({"a": {"b": ["x", "y"]}, "c": {"d": ["u", "v"], "e": ["w"]}})
    torch.manual_seed(0)
    model = build_model(name, 20, tree.num_classes, tree.parents, hidden=12, readout=readout)
    for parameter in model.parameters():  # some begin at 0
        torch.nn.init.normal_(parameter, std=0.3)
    model = model.double().eval()
    x = torch.randn(300, 20, dtype=torch.float64)
    bags = torch.tensor([[0, 1], [1, 2], [3, 297]])
    out = model(x, bags)
    prior = [level[0] for level in all_levels(tree, balanced_prior(tree)[None])]
    trained = [np.arange(1, k + 1) / np.arange(1, k + 1).sum() for k in tree.num_classes]
    shares = [
        (torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(prior, trained, strict=True)
    ]
    for summed in (False, True):
        head = PlainHead(model, tree.parents, shares, summed=summed).double()
        for b, (start, length) in enumerate(bags.tolist()):
            found = dict(zip(head.output_names, head(x[start : start + length]), strict=True))
            assert len(found) == (6 if name in ("mean", "max") else 9)
            softmax = [logits[b].softmax(0)[None].detach().numpy() for logits in out.logits]
            p_leaf = leaf_probabilities(tree, softmax, trained, heads=not summed)
            levels = all_levels(tree, p_leaf)
            for l, logits in enumerate(out.logits):
                torch.testing.assert_close(found[f"logits_{l}"], logits[b])
                p = torch.from_numpy(levels[l][0])
                torch.testing.assert_close(found[f"probabilities_{l}"], p)
                if out.attention_logits:
                    own = out.attention_logits[l][start : start + length] - out.lse[l][b]
                    torch.testing.assert_close(found[f"attention_{l}"], own.exp())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flat", "abmil", "clam", "dsmil", "max"])
def test_every_baseline_trains_exports_and_is_drawn(
    train_small: Callable[..., Any], cohort: Any, tmp_path: Path, name: str
) -> None:
    run = train_small(tmp_path / "run", model=name, folds=2, epochs=1)
    log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    terms = next(line["terms"] for line in log if line["event"] == "epoch")
    assert ("auxiliary" in terms) == (name == "clam")
    assert "ham" not in terms
    assert name != "flat" or not {"hba", "marginal"} & terms.keys()
    ((file, apart),) = export.export_run(run, tmp_path, [0]).items()
    assert file.exists()
    assert apart < 1e-4
    picture = ["--store", str(cohort.path / "store"), "--out", str(tmp_path / "s06.png")]
    assert main(["heatmap", str(run.path), "s06", *picture]) == (2 if name == "max" else 0)


def test_a_file_that_disagrees_is_not_kept(
    run: Any, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_run(run.path)
    shutil.copytree(heads, tmp_path, dirs_exist_ok=True)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    write = export.write_onnx

    def write_another(head: Any, dim: int, path: Path, metadata: dict[str, Any]) -> None:
        model = load_fold(opened, 1, torch.device("cpu"))
        shares = export.level_shares(opened, 1)
        another = PlainHead(model, opened.tree.parents, shares, summed=opened.sums)
        write(another, dim, path, metadata)

    monkeypatch.setattr(export, "write_onnx", write_another)
    with pytest.raises(UsageError, match="onnxruntime differs from the model of fold 0 by"):
        export.export_run(opened, tmp_path, [0])
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_mistakes_are_told_in_words(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["export", str(run.path), "--out", str(tmp_path / "out")]
    assert main([*command, "--fold", "3"]) == 2
    assert "has no fold 3\nFix: give --fold 0 to 2" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["export", str(run.path), "--out", str(tmp_path / "file" / "x")]) == 2
    assert "cannot write" in capsys.readouterr().err
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run" / "fold-0" / "predictions.csv").unlink()
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert "is not trained to its end" in capsys.readouterr().err
    monkeypatch.setattr(
        export, "find_spec", lambda name: None if name == "onnxscript" else object()
    )
    assert main(command) == 2
    wanted = 'needs onnxscript, not installed here\nFix: run `pip install "hmil-fast[export]"`'
    assert wanted in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_a_card_lies_beside_every_checkpoint(run: Any) -> None:
    for path in (run.path, run.path / "baseline"):
        opened = open_run(path)
        for fold in range(3):
            folder = path / f"fold-{fold}"
            card = json.loads((folder / "model_card.json").read_text())
            assert card == fold_card(opened, fold)
            assert (folder / "model_card.md").read_text() == markdown(card)
    metrics = json.loads((run.path / "metrics.json").read_text())
    card = fold_card(open_run(run.path), 2)
    assert card["metrics"] == {"pooled": metrics["pooled"], "fold": metrics["folds"][2]}
    assert card["features"]["encoder"]["weights_sha256"] == "0" * 64
    parts = card["data"]["parts"]
    assert sum(part["slides"] for part in parts.values()) == 36
    assert card["data"]["patients_in_two_parts"] == 0
    text = markdown(card)
    auc = metrics["pooled"]["levels"]["1"]["auc"]
    assert f"{auc['value']:.3f} \\[{auc['low']:.3f}, {auc['high']:.3f}\\]" in text
    assert "Learnt from fewer than 10 patients each: " in text
    assert "- benign\n  - N\n  - PB\n- malignant" in text


def test_names_do_not_break_the_tables_of_a_card(
    train_small: Callable[..., Any], cohort: Any, tmp_path: Path
) -> None:
    run = train_small(tmp_path / "run", model="mean", folds=2, epochs=1)
    write_card(run)
    card = json.loads((run.path / "fold-0" / "model_card.json").read_text())
    card["tree"]["names"][1][0] = "N|`<b>`\n# head"
    text = markdown(card)
    head = next(line for line in text.splitlines() if line.startswith("| part"))
    assert "N\\|\\`\\<b\\>\\` \\# head" in head
    assert "\n# head" not in text


def test_a_damaged_run_has_no_card(run: Any, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text("{")
    with pytest.raises(UsageError, match=r"cannot read .*metrics\.json"):
        write_card(open_run(tmp_path / "run"))
