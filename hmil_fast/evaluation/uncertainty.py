"""Fit calibration and conformal predictions on validation slides, and apply them.

Both are fitted per fold on its validation slides, which its model was not trained on but which
chose its epoch, and shown on its test slides. For another cohort they are fitted on all slides that
the run tested.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmil_fast.evaluation.prior import Prior, under_prior
from hmil_fast.metrics import all_levels, calibration_scores, fit_temperature, with_temperature
from hmil_fast.metrics.conformal import (
    Answers,
    conformal_answers,
    conformal_summary,
    join_answers,
    node_contains,
    slides_needed,
)
from hmil_fast.runs.predictions import (
    Prediction,
    read_predictions,
    run_predictions,
    stack_leaves,
)
from hmil_fast.runs.run import Run, write_csv

# slides that something is fitted on, and slides that it is tested on; per fold
Groups = Sequence[tuple[Sequence[Prediction], Sequence[Prediction]]]


def fold_groups(run: Run, predictions: Sequence[Prediction], prior: Prior) -> Groups:
    """Per fold its validation slides and its test slides; empty where a fold has none of the first.

    Raises:
        UsageError: A file is damaged.
    """
    groups = []
    for fold in range(len(run.folds)):
        path = run.val_path(fold)
        held_out = read_predictions(path, run.tree) if path.exists() else []
        if not held_out:
            return []
        tested = [p for p in predictions if p.fold == fold]
        groups.append((under_prior(run.tree, held_out, prior), tested))
    return groups


def calibration(run: Run, groups: Groups) -> dict[str, Any]:
    """Calibration of the test predictions, before and after a temperature per group.

    The temperature is that of the leaves; a parent stays the sum of its children.

    Returns:
        ``{"slides": [slides fitted on, per group], "temperature": [per group], "levels": {"0":
        {"before": {"ece", "ece_adaptive", "brier", "nll"}, "after": the same}}}``.
    """
    tree = run.tree
    temperatures, after = [], []
    order: list[Prediction] = []
    for slides, mine in groups:
        temperatures.append(fit_temperature(_leaves(run, slides), stack_leaves(slides, tree)))
        after.append(with_temperature(stack_leaves(mine, tree), temperatures[-1]))
        order += mine
    y = tree.ancestors()[:, _leaves(run, order)]
    levels = zip(
        all_levels(tree, stack_leaves(order, tree)),
        all_levels(tree, np.concatenate(after)),
        strict=True,
    )
    return {
        "slides": [len(slides) for slides, _ in groups],
        "temperature": temperatures,
        "levels": {
            str(level): {
                "before": calibration_scores(y[level], before),
                "after": calibration_scores(y[level], mended),
            }
            for level, (before, mended) in enumerate(levels)
        },
    }


def conformal(
    run: Run, groups: Groups, risk: float
) -> tuple[dict[str, Any], list[Prediction], Answers]:
    """Answers for the test slides that meet a risk, and what they are worth.

    The probabilities are taken as they are: a temperature fitted on the same slides would be
    tested by itself.

    Returns:
        ``{"risk", "slides": [slides fitted on, per group], "needed": fewest for this risk, "note",
        **conformal_summary}``, and the predictions with their answers in the same order.
    """
    needed = slides_needed(risk)
    order: list[Prediction] = []
    parts = []
    for slides, mine in groups:
        if mine:
            known = _leaves(run, slides), stack_leaves(slides, run.tree)
            order += mine
            parts.append(conformal_answers(run.tree, known, stack_leaves(mine, run.tree), risk))
    answers = join_answers(parts)
    few = sum(len(slides) < needed for slides, _ in groups)
    note = (
        "fitted on the validation slides of each fold, which also chose its epoch, and slides of "
        "a patient are not independent: the coverage seen is the one to go by"
    )
    if any(p.fold < 0 for p in order):
        note = (
            "fitted on the slides that the run tested, each predicted by one fold; these slides "
            "are predicted by the mean of the folds"
        )
    if few:
        note = (
            f"{few} of {len(groups)} folds have fewer than the {needed} validation slides that "
            f"a risk of {risk:g} needs: there every answer is the root, every set is full; " + note
        )
    summary = conformal_summary(
        run.tree,
        _leaves(run, order),
        answers,
        [p.patient_id for p in order],
        (1000, run.config.seed),
    )
    head = {
        "risk": risk,
        "slides": [len(slides) for slides, _ in groups],
        "needed": needed,
        "note": note,
    }
    return head | summary, order, answers


def write_answers(
    path: Path, run: Run, predictions: Sequence[Prediction], answers: Answers
) -> None:
    """Write conformal.csv: per test slide the answered node and the sets of leaves."""
    right = node_contains(run.tree, answers.level, answers.node, _leaves(run, predictions))
    rows: list[list[object]] = [
        ["slide_id", "patient_id", "fold", "label", "node", "level", "right", "lac", "aps"]
    ]
    for i, (p, *said) in enumerate(zip(predictions, *_in_words(run, answers), strict=True)):
        node, level, *sets = said
        rows.append([p.slide_id, p.patient_id, p.fold, p.label, node, level, int(right[i]), *sets])
    write_csv(path, rows)


def answer_new_slides(
    run: Run, predictions: Sequence[Prediction], prior: Prior, risk: float
) -> dict[str, list[object]]:
    """Answers for slides that the run has not seen, as columns of a table.

    They are calibrated on the slides that the run tested, each by the fold that had not seen it.
    A new slide is predicted by the mean of all folds, so the risk is met by approximation only.

    Args:
        run: The run.
        predictions: Of the new slides, under `prior`.
        prior: How frequent the leaves are.
        risk: Accepted share of answers without the true leaf, in (0, 1).

    Returns:
        ``node`` ("" for the root), ``level`` (−1 for the root) and ``leaves``, the set of LAC.
    """
    tested = under_prior(run.tree, run_predictions(run), prior)
    known = _leaves(run, tested), stack_leaves(tested, run.tree)
    p = stack_leaves(predictions, run.tree)
    node, level, lac, _ = _in_words(run, conformal_answers(run.tree, known, p, risk))
    return {"node": node, "level": level, "leaves": lac}


def _in_words(run: Run, answers: Answers) -> list[list[object]]:
    """Node, level and the two sets of leaves of every answer."""
    leaves = np.array(run.tree.leaves)
    levels = answers.level.tolist()
    nodes = [
        run.tree.names[level][node] if level >= 0 else ""
        for level, node in zip(levels, answers.node.tolist(), strict=True)
    ]
    sets = [["|".join(leaves[row]) for row in chosen] for chosen in (answers.lac, answers.aps)]
    return [nodes, levels, *sets]


def _leaves(run: Run, predictions: Sequence[Prediction]) -> NDArray[np.int64]:
    return np.array([run.tree.leaf(p.label) for p in predictions], dtype=np.int64)
