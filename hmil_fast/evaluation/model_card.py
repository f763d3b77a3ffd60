"""Write model cards: what a checkpoint is, its data, metrics and intended use."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hmil_fast import __version__
from hmil_fast.errors import UsageError
from hmil_fast.files import write_text
from hmil_fast.metrics import cell_text
from hmil_fast.runs.checkpoint import read_checkpoint
from hmil_fast.runs.run import Run, write_json

_FEW_PATIENTS = 10
_USE = """\
Research on slides like those below: the same stain, tissue, scanner and question. It ranks and
explains; a pathologist decides. It is no medical device, and nobody has tested it as one."""
_LIMITS = """\
- It reads features, not pixels: of exactly the encoder, weights, tile size and resolution named \
here. Other features of the same size give an answer too, a meaningless one.
- It knows the leaves of its tree only, and calls every slide one of them.
- The metrics come from slides of the same cohort. On another laboratory or scanner expect less, \
and measure it: `hmil-fast evaluate RUN --store DIR --labels CSV`.
- Attention shows what was weighed, not why, and is no segmentation."""


def write_card(run: Run) -> None:
    """Write model_card.md and model_card.json beside every checkpoint of a trained run.

    Raises:
        UsageError: A fold is not trained, or a file of the run is damaged.
    """
    for fold in range(len(run.folds)):
        card = fold_card(run, fold)
        write_json(run.fold_path(fold) / "model_card.json", card)
        write_text(run.fold_path(fold) / "model_card.md", markdown(card))


def fold_card(run: Run, fold: int) -> dict[str, Any]:
    """The card of one fold's checkpoint, JSON-able.

    Raises:
        UsageError: The fold is not trained, or a file of the run is damaged.
    """
    weights = run.fold_path(fold) / "best.safetensors"
    _, state = read_checkpoint(weights)
    metrics = _read(run.path / "metrics.json")
    parts = {part: set(getattr(run.folds[fold], part)) for part in ("train", "val", "test")}
    patients = [{s.patient_id for s in run.slides if s.slide_id in part} for part in parts.values()]
    return {
        "model": run.config.recipe.model,
        "fold": fold,
        "folds": len(run.folds),
        "best": state.get("best", {}),
        "weights": {
            "file": weights.name,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        },
        "hmil_fast": __version__,
        "features": run.store,
        "tree": run.tree.to_dict(),
        "data": {
            "splits_sha256": _read(run.path / "splits.json").get("sha256"),
            "patients_in_two_parts": sum(map(len, patients)) - len(set().union(*patients)),
            "parts": {part: _counts(run, slide_ids) for part, slide_ids in parts.items()},
        },
        "settings": run.config.values(),
        "metrics": {
            "pooled": metrics.get("pooled"),
            "fold": metrics["folds"][fold] if metrics else None,
        },
    }


def markdown(card: dict[str, Any]) -> str:
    """A card for people to read, in Markdown."""
    tree, data = card["tree"], card["data"]["parts"]
    twice = card["data"]["patients_in_two_parts"]
    leaves = tree["names"][-1]
    few = [leaf for leaf in leaves if data["train"]["patients_of"].get(leaf, 0) < _FEW_PATIENTS]
    rare = f"\n- Learnt from fewer than {_FEW_PATIENTS} patients each: {_text(', '.join(few))}."
    rows = [
        [part, data[part]["slides"], data[part]["patients"]]
        + [data[part]["slides_of"].get(leaf, 0) for leaf in leaves]
        for part in data
    ]
    weights, epoch = card["weights"], card["best"].get("epoch", -1) + 1
    sections = [
        f"# Model card: {card['model']}, fold {card['fold']} of 0–{card['folds'] - 1}",
        f"`{weights['file']}`, sha256 `{weights['sha256']}`, of epoch {epoch}.",
        "## Intended use",
        _USE,
        "## Limits",
        _LIMITS + (rare if few else ""),
        "## Label tree",
        _tree(tree),
        "## Data",
        f"Splits sha256 `{card['data']['splits_sha256']}`; patients in two parts: {twice}. Slides:",
        _table(["part", "slides", "patients", *leaves], rows),
        "## Metrics",
        _metrics(card["metrics"], tree),
        "## Features",
        _pairs(_flat(card["features"])),
        "## Settings",
        _pairs({"hmil_fast": card["hmil_fast"], **card["settings"]}),
    ]
    return "\n\n".join(sections) + "\n"


def _counts(run: Run, chosen: set[str]) -> dict[str, Any]:
    slides = [slide for slide in run.slides if slide.slide_id in chosen]
    patients = {(slide.label, slide.patient_id) for slide in slides}
    return {
        "slides": len(slides),
        "patients": len({slide.patient_id for slide in slides}),
        "slides_of": dict(sorted(Counter(slide.label for slide in slides).items())),
        "patients_of": dict(sorted(Counter(label for label, _ in patients).items())),
    }


def _metrics(metrics: dict[str, Any], tree: dict[str, Any]) -> str:
    pooled, fold = metrics["pooled"], metrics["fold"]
    if not pooled:
        return "Not evaluated by itself; see the metrics of the run."
    rows = []
    places = [(f"level {level}", "levels", level) for level in pooled["levels"]]
    for name, group, level in [*places, ("tree", "tree", None)]:
        cells = pooled[group] if level is None else pooled[group][level]
        here = fold[group] if level is None else fold[group].get(level, {})
        for metric, cell in cells.items():
            if isinstance(cell, dict) and isinstance(cell.get("value"), float):
                rows.append([name, metric, cell_text(cell), cell_text(here.get(metric))])
    levels = "; ".join(f"level {l}: {', '.join(names)}" for l, names in enumerate(tree["names"]))
    return (
        f"Every slide tested once, by the fold that did not see it: {pooled['slides']} slides of "
        f"{pooled['patients']} patients, 95 % intervals over resampled patients. "
        f"{_text(levels)}.\n\n" + _table(["", "metric", "all folds", "this fold"], rows)
    )


def _tree(tree: dict[str, Any]) -> str:
    names, parents = tree["names"], tree["parents"]
    lines: list[str] = []

    def add(level: int, k: int) -> None:
        lines.append(f"{'  ' * level}- {_text(names[level][k])}")
        if level < len(parents):
            for child, parent in enumerate(parents[level]):
                if parent == k:
                    add(level + 1, child)

    for k in range(len(names[0])):
        add(0, k)
    return "\n".join(lines)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def _pairs(values: dict[str, Any]) -> str:
    return _table(["", ""], [[name, value] for name, value in values.items()])


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_text(cell) for cell in line)} |" for line in lines)


def _text(value: object) -> str:
    """A name as it is, whatever Markdown would make of it."""
    text = " ".join(str(value).split())
    return text if text == "---" else "".join(f"\\{c}" if c in r"\`*_[]<>|#" else c for c in text)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of the run; empty if it is not there."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"cannot read {path}: {error}", "run `hmil-fast evaluate`") from None
