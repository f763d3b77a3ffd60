"""Compare rules of the decision (docs/decisions.md): the best leaf against sums of leaves."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bench.accuracy.fit import Probabilities
from bench.accuracy.statistics import Run
from hmil_fast.labels import LabelTree
from hmil_fast.metrics import all_levels, balanced_prior, decide, flat_metrics


def leaf_evidence(tree: LabelTree, p_leaf: Probabilities) -> Probabilities:
    """The evidence for every leaf, of sum 1, from probabilities under the balanced prior."""
    levels = all_levels(tree, p_leaf)
    evidence = levels[0]
    for level, parents in enumerate(tree.parents, start=1):
        above = np.asarray(parents)
        best = np.zeros_like(evidence)
        np.maximum.at(best.T, above, levels[level].T)
        evidence = evidence[:, above] * levels[level] / np.maximum(best[:, above], 1e-300)
    return np.asarray(evidence / evidence.sum(axis=1, keepdims=True))


def _sum_alike(tree: LabelTree, p: Probabilities) -> Probabilities:
    return leaf_evidence(tree, p)


def _sum_balanced(tree: LabelTree, p: Probabilities) -> Probabilities:
    weighed = leaf_evidence(tree, p) * balanced_prior(tree)
    return np.asarray(weighed / weighed.sum(axis=1, keepdims=True))


RULES: dict[str, Callable[[LabelTree, Probabilities], Probabilities]] = {
    "sum, leaves alike": _sum_alike,
    "sum, balanced prior": _sum_balanced,
    "best leaf, balanced prior": lambda _, p: p,
}


def measure(tree: LabelTree, runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Per rule the mean over seeds of balanced accuracies and rates of the coarsest level.

    Returns:
        ``{rule: {"coarse", "leaf": balanced accuracy, "sensitivity", "specificity": of the second
        coarse node}}``.
    """
    found: dict[str, dict[str, float]] = {}
    for rule, apply in RULES.items():
        rows = []
        for run in runs:
            answers = decide(tree, apply(tree, run.p)).nodes
            coarse, leaf = tree.ancestors()[[0, -1]][:, run.y]
            sick = coarse == 1
            rows.append(
                {
                    "coarse": flat_metrics(coarse, all_levels(tree, run.p)[0], answers[0])[
                        "balanced_accuracy"
                    ],
                    "leaf": flat_metrics(leaf, run.p, answers[-1])["balanced_accuracy"],
                    "sensitivity": float((answers[0][sick] == 1).mean()),
                    "specificity": float((answers[0][~sick] == 0).mean()),
                }
            )
        found[rule] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return found


def markdown(tasks: Mapping[str, Mapping[str, dict[str, dict[str, float]]]]) -> str:
    """The table of all tasks; an entry is {task: {method: `measure`}}."""
    lines = [
        "| task, method | rule | balanced accuracy, coarse | leaf | specificity | sensitivity |",
        "|---" * 6 + "|",
    ]
    for task, methods in tasks.items():
        for method, rules in methods.items():
            for rule, row in rules.items():
                values = (row[k] for k in ("coarse", "leaf", "specificity", "sensitivity"))
                cells = " | ".join(f"{value:.3f}" for value in values)
                lines.append(f"| {task}, `{method}` | {rule} | {cells} |")
    return "\n".join(lines) + "\n"
