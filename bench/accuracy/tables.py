"""What `make evaluate` writes: JSON for machines, a page for people."""

import math
from pathlib import Path
from string import Template
from typing import Any

from bench.accuracy import decisions
from bench.accuracy.cohorts import TASKS
from bench.accuracy.methods import YARDSTICK
from bench.accuracy.statistics import METRICS, Draws, interval, paired_p
from bench.accuracy.tiles import ANSWER, OVER_ALL
from hmil_fast.metrics import holm

TITLES = {
    "balanced_accuracy": "balanced accuracy",
    "hierarchical_f1": "hierarchical F1",
    "auc": "AUC",
    "accuracy": "accuracy",
}
OURS = ("best", "paper", "released", "best-flat")


def summarise(found: dict[str, dict[str, Draws]]) -> dict[str, Any]:
    """Values, intervals and paired tests of one task, JSON-able.

    Tests compare each method with preset `best` (with `paper` where there is no `best`) and each
    with the baseline of the highest balanced accuracy; p is Holm's over the methods of the task.
    The difference is that of these two, in each metric.
    """
    leader = next((name for name in OURS if name in found), next(iter(found)))
    baselines = [name for name in found if name not in OURS]
    result: dict[str, Any] = {"compared_with": leader, "best_baseline": None, "methods": {}}
    for name, values in found.items():
        cells = {metric: _cell(values[metric]) for metric in METRICS}
        result["methods"][name] = {"metrics": cells}
    rivals = {"p_leader": leader}
    if baselines:
        result["best_baseline"] = max(baselines, key=lambda n: found[n]["balanced_accuracy"][0])
        rivals["p_best_baseline"] = result["best_baseline"]
        ours, theirs = found[leader], found[result["best_baseline"]]
        result["difference"] = {metric: _cell(ours[metric] - theirs[metric]) for metric in METRICS}
    for field, rival in rivals.items():
        for metric in METRICS:
            p = {
                name: paired_p(found[rival][metric], values[metric])
                for name, values in found.items()
                if name != rival
            }
            for name, value in holm(p).items():
                result["methods"][name]["metrics"][metric][field] = value
    return result


def _cell(values: Draws) -> dict[str, float]:
    value, low, high = interval(values)
    return {"value": value, "low": low, "high": high}


def markdown(results: dict[str, Any]) -> str:
    """The tables of all tasks."""
    parts = []
    for name, task in results["tasks"].items():
        leader, rival = task["compared_with"], task["best_baseline"]
        flat = not TASKS[name].redrawn
        metrics = [m for m in METRICS if not (flat and m == "hierarchical_f1")]
        lines = [
            f"### {TASKS[name].title}",
            "",
            f"{task['about']} {task['seeds']} seeds.",
            "",
            "| method | "
            + " | ".join(TITLES[m] for m in metrics)
            + f" | p, {leader} | p, {rival} |",
            "|---" * (len(metrics) + 3) + "|",
        ]
        order = sorted(
            task["methods"],
            key=lambda n: -task["methods"][n]["metrics"]["balanced_accuracy"]["value"],
        )
        tops = {m: max(v["metrics"][m]["value"] for v in task["methods"].values()) for m in metrics}
        for method in order:
            cells = task["methods"][method]["metrics"]
            shown = [_shown(cells[m], tops[m]) for m in metrics]
            tests = [_p(cells["balanced_accuracy"], f) for f in ("p_leader", "p_best_baseline")]
            title = f"`{method}`" if method != YARDSTICK else "pooled logistic regression"
            lines.append("| " + " | ".join([title, *shown, *tests]) + " |")
        if rival:
            each = (f"{TITLES[m]} {_shown(task['difference'][m], math.nan)}" for m in metrics)
            lines += ["", f"`{leader}` over `{rival}`: {', '.join(each)}."]
        parts.append("\n".join(lines + _tiles(task["methods"], order)))
    for name, why in results["skipped"].items():
        parts.append(f"### {TASKS[name].title}\n\nSkipped: {why}")
    return "\n\n".join(parts) + "\n"


def _tiles(methods: dict[str, Any], order: list[str]) -> list[str]:
    """The table of tile-level AUC; no lines where no tile is labelled."""
    found = {name: methods[name].get("tile_auc") or {} for name in order}
    titles = list(dict.fromkeys(title for aucs in found.values() for title in aucs))
    if not titles:
        return []
    titles.sort(key=(ANSWER, OVER_ALL).__contains__, reverse=True)
    text = (
        "AUC of tumour tiles against the others by the attention of a node, mean over the slides "
        "with both kinds and over the seeds, in brackets the lowest seed:"
    )
    lines = [
        "",
        text,
        "",
        f"| method | {' | '.join(titles)} |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for name, aucs in found.items():
        if aucs:
            cells = (
                f"{sum(aucs[t]) / len(aucs[t]):.3f} ({min(aucs[t]):.3f})" if t in aucs else "–"
                for t in titles
            )
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def _shown(cell: dict[str, float], top: float) -> str:
    value, low, high = (f"{round(cell[k], 3) + 0:.3f}" for k in ("value", "low", "high"))  # no -0
    value = f"**{value}**" if cell["value"] == top else value
    return f"{value} ({low} to {high})"


def _p(cell: dict[str, float], field: str) -> str:
    if field not in cell:
        return ""
    return "< 0.001" if cell[field] < 0.001 else f"{cell[field]:.3f}"


def page(results: dict[str, Any]) -> str:
    """The page docs/accuracy.md: `page.md` with the numbers filled in."""
    shared = next(iter(next(iter(results["settings"].values())).values()))
    rates = []
    for task, methods in results["settings"].items():
        by_rate: dict[tuple[float, str], list[str]] = {}
        for name, values in methods.items():
            if name != YARDSTICK:
                pair = values["lr"], values["strength"]
                by_rate.setdefault(pair, []).append(f"`{name}`")
        named = (
            f"{lr:g} {strength} {', '.join(on)}" for (lr, strength), on in sorted(by_rate.items())
        )
        rates.append(f"- {task}: {'; '.join(named)}")
    text = Path(__file__).with_name("page.md").read_text(encoding="utf-8")
    return Template(text).substitute(
        tables=markdown(results),
        decisions=decisions.markdown(
            {
                TASKS[name].title: task.get("decisions", {})
                for name, task in results["tasks"].items()
            }
        ),
        minutes=round(results["cpu_minutes"]),
        draws=results["draws"],
        epochs=", ".join(f"{name} {task['epochs']}" for name, task in results["tasks"].items()),
        rates="\n".join(rates),
        **{name: shared[name] for name in ("batch_bags", "hidden")},
    )
