"""How far a run's answers can be trusted: calibration, and answers that meet a risk."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hmil_fast.metrics import level_name
from hmil_fast.report.html.data import ReportData
from hmil_fast.report.html.tables import count, number_text, value_text

_SCORES = {
    "ece": "calibration error", "ece_adaptive": "in bins of equal count", "brier": "Brier score",
    "nll": "negative log-likelihood",
}  # fmt: skip
_KINDS = {
    "node": "one node of the tree, as deep as the risk allows",
    "lac": "a set of leaves (LAC)",
    "aps": "a set of leaves (APS)",
}


def trust_section(data: ReportData) -> str:
    """Operating point, calibration and conformal answers, as far as metrics.json has them."""
    return _operating(data) + _calibration(data) + _conformal(data)


def _operating(data: ReportData) -> str:
    """Sensitivity and specificity at the threshold that was chosen on other slides."""
    found = data.metrics.get("operating") or {}
    if "sensitivity" not in found and "specificity" not in found:
        return ""
    cells = "".join(
        f'<tr><th scope="row">{name}</th><td class="n">{value_text(found.get(name))}</td></tr>'
        for name in ("sensitivity", "specificity", "precision")
    )
    of, asked = escape(str(found.get("of"))), float(found.get("asked") or 0)
    limits = ", ".join(number_text(float(t)) for t in found.get("thresholds") or ())
    slides = ", ".join(str(int(n)) for n in found.get("positives") or ())
    return (
        f'<h3>Operating point of {of}</h3><p class="note">Asked: a sensitivity of {asked:g}. The '
        f"thresholds on its probability ({limits}) were chosen on {slides} slides of {of} that are "
        f'not tested here.</p><div class="wide"><table id="operating">{cells}</table></div>'
    )


def _calibration(data: ReportData) -> str:
    found = data.metrics.get("calibration") or {}
    levels = found.get("levels") or {}
    heads = "".join(f'<th scope="col" class="n">{name}</th>' for name in _SCORES.values())
    lines = []
    for level in range(data.tree.num_levels):
        scores = levels.get(str(level))
        if not scores:
            continue
        cells = "".join(
            f'<td class="n">{number_text((scores.get("before") or {}).get(key))} → '
            f"<b>{number_text((scores.get('after') or {}).get(key))}</b></td>"
            for key in _SCORES
        )
        name = level_name(level, data.tree.num_levels)
        lines.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    if not lines:
        return ""
    slides = ", ".join(str(n) for n in found.get("slides") or ())
    temperatures = ", ".join(f"{t:.2f}" for t in found.get("temperature") or ())
    prior = (data.metrics.get("prior") or {}).get("name", "balanced")
    note = (
        f"Before and after a temperature ({temperatures}) that is fitted on held-out slides "
        f"({slides}); less is better. The probabilities elsewhere in this report are without it. "
        f"They are under the prior “{prior}”: the frequencies of the cohort are met by “cohort”."
    )
    return (
        f'<h3>Calibration</h3><p class="note">{escape(note)}</p>'
        '<div class="wide"><table id="calibration">'
        f'<thead><tr><th scope="col">level</th>{heads}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _conformal(data: ReportData) -> str:
    found = data.metrics.get("conformal") or {}
    lines = []
    for kind, name in _KINDS.items():
        seen = found.get(kind) or {}
        if "coverage" not in seen:
            continue
        says = seen.get("mean_leaves") or seen.get("mean_size")
        single = seen.get("leaf_share") or seen.get("single_share")
        cells = "".join(
            f'<td class="n">{value_text(cell)}</td>' for cell in (seen["coverage"], says, single)
        )
        lines.append(f"<tr><td>{name}</td>{cells}</tr>")
    if not lines:
        return ""
    risk, said = float(found.get("risk") or 0), str(found.get("note") or "")
    note = (
        f"Asked: a right answer for {100 * (1 - risk):g} % of the slides, however unsure the model "
        f"is; it may say less, but not be wrong more often. {said[:1].upper()}{said[1:]}."
    )
    heads = "".join(
        f'<th scope="col" class="n">{name}</th>'
        for name in ("right", "leaves in the answer", "answers of one leaf")
    )
    return (
        f'<h3>Answers that meet a risk of {risk:g}</h3><p class="note">{escape(note)}</p>'
        '<div class="wide"><table id="conformal"><thead><tr><th scope="col">answer</th>'
        f"{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f"{_depths(data, found)}{_leaves(found)}"
    )


def _depths(data: ReportData, found: Mapping[str, Any]) -> str:
    """How deep the nodes lie that were answered."""
    depths = (found.get("node") or {}).get("depths") or {}
    named = [
        f"{count(int(n), 'slide')} at {_depth(int(depth), data.tree.num_levels)}"
        for depth, n in depths.items()
    ]
    return f'<p class="note">The node: {"; ".join(named)}.</p>' if named else ""


def _depth(depth: int, levels: int) -> str:
    if depth == 0:
        return "the root, which says nothing"
    return "a leaf" if depth == levels else f"depth {depth}"


def _leaves(found: Mapping[str, Any]) -> str:
    """The share of right answers per true leaf: a risk is met on average, not for each."""
    leaves: Mapping[str, Mapping[str, Any]] = found.get("leaves") or {}
    if not leaves:
        return ""
    columns: Sequence[tuple[str, str]] = (("node", "node"), ("lac", "LAC"), ("aps", "APS"))
    heads = "".join(f'<th scope="col" class="n">{name}</th>' for _, name in columns)
    lines = "".join(
        f'<tr><th scope="row">{escape(leaf)}</th><td class="n">{seen.get("slides", "–")}</td>'
        + "".join(f'<td class="n">{number_text(seen.get(key))}</td>' for key, _ in columns)
        + "</tr>"
        for leaf, seen in leaves.items()
    )
    return (
        '<p class="note">Share of right answers per true leaf; the risk is met over all, not for '
        'each.</p><div class="wide"><table><thead><tr><th scope="col">true leaf</th>'
        f'<th scope="col" class="n">slides</th>{heads}</tr></thead><tbody>{lines}</tbody></table>'
        "</div>"
    )
