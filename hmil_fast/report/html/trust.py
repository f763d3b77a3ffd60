"""Gather the report's section on trust: operating point, calibration, conformal answers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from hmil_fast.metrics import level_name, number_text
from hmil_fast.report.html.data import ReportData
from hmil_fast.report.html.tables import Metric, metric_of

_SCORES = {
    "ece": "calibration error", "ece_adaptive": "in bins of equal count", "brier": "Brier score",
    "nll": "negative log-likelihood",
}  # fmt: skip
_KINDS = {
    "node": "one node of the tree, as deep as the risk allows",
    "lac": "a set of leaves (LAC)",
    "aps": "a set of leaves (APS)",
}


class Operating(NamedTuple):
    """The threshold for a wanted sensitivity, chosen on other slides, and what it gives here."""

    node: str
    sensitivity: float
    thresholds: list[str]
    slides: list[int]
    rows: list[tuple[str, Metric | None]]


class Calibration(NamedTuple):
    """Scores per level before and after a temperature."""

    temperatures: list[str]
    slides: list[str]
    prior: str
    scores: list[str]
    rows: list[tuple[str, list[tuple[str, str]]]]


class Conformal(NamedTuple):
    """Answers that are wrong for at most a share `risk` of the slides.

    Attributes:
        risk: The allowed share, 0 to 1.
        note: A sentence on it, without its full stop.
        rows: Per kind of answer its name, coverage, size and share of single leaves.
        depths: Slides by the depth of the node they are answered with, as count and place.
        leaves: Per true leaf its slides and the share of right answers of each kind.
    """

    risk: float
    note: str
    rows: list[tuple[str, list[Metric | None]]]
    depths: list[tuple[int, str]]
    leaves: list[tuple[str, list[str]]]


class Trust(NamedTuple):
    """The parts of the section; None where metrics.json lacks one."""

    operating: Operating | None
    calibration: Calibration | None
    conformal: Conformal | None


def trust_of(data: ReportData) -> Trust | None:
    """What metrics.json has on trust; None where it has nothing."""
    trust = Trust(_operating(data), _calibration(data), _conformal(data))
    return trust if any(trust) else None


def _operating(data: ReportData) -> Operating | None:
    point = data.metrics.get("operating") or {}
    if "sensitivity" not in point and "specificity" not in point:
        return None
    return Operating(
        node=str(point.get("of")),
        sensitivity=float(point.get("asked") or 0),
        thresholds=[number_text(float(t)) for t in point.get("thresholds") or ()],
        slides=[int(n) for n in point.get("positives") or ()],
        rows=[(k, metric_of(point.get(k))) for k in ("sensitivity", "specificity", "precision")],
    )


def _calibration(data: ReportData) -> Calibration | None:
    calibration = data.metrics.get("calibration") or {}
    levels = calibration.get("levels") or {}
    rows = []
    for level in range(data.tree.num_levels):
        scores = levels.get(str(level))
        if scores:
            before, after = scores.get("before") or {}, scores.get("after") or {}
            pairs = [(number_text(before.get(k)), number_text(after.get(k))) for k in _SCORES]
            rows.append((level_name(level, data.tree.num_levels), pairs))
    if not rows:
        return None
    return Calibration(
        temperatures=[f"{t:.2f}" for t in calibration.get("temperature") or ()],
        slides=[str(n) for n in calibration.get("slides") or ()],
        prior=(data.metrics.get("prior") or {}).get("name", "balanced"),
        scores=list(_SCORES.values()),
        rows=rows,
    )


def _conformal(data: ReportData) -> Conformal | None:
    conformal = data.metrics.get("conformal") or {}
    rows = []
    for kind, name in _KINDS.items():
        answers = conformal.get(kind) or {}
        if "coverage" in answers:
            size = answers.get("mean_leaves") or answers.get("mean_size")
            single = answers.get("leaf_share") or answers.get("single_share")
            cells = (answers["coverage"], size, single)
            rows.append((name, [metric_of(cell) for cell in cells]))
    if not rows:
        return None
    note = str(conformal.get("note") or "")
    depths = (conformal.get("node") or {}).get("depths") or {}
    levels = data.tree.num_levels
    return Conformal(
        risk=float(conformal.get("risk") or 0),
        note=note[:1].upper() + note[1:],
        rows=rows,
        depths=[(int(n), _place(int(depth), levels)) for depth, n in depths.items()],
        leaves=_leaves(conformal.get("leaves") or {}),
    )


def _place(depth: int, levels: int) -> str:
    if depth == 0:
        return "the root, which says nothing"
    return "a leaf" if depth == levels else f"depth {depth}"


def _leaves(leaves: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    return [
        (leaf, [str(row.get("slides", "–")), *(number_text(row.get(kind)) for kind in _KINDS)])
        for leaf, row in leaves.items()
    ]
