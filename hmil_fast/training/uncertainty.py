"""How far a run's probabilities can be trusted: calibration, and answers that meet a risk.

Both are fitted per fold on its validation slides, which its model was not trained on but which
chose its epoch, and shown on its test slides.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmil_fast.metrics import calibration_scores, fit_temperature, summed, with_temperature
from hmil_fast.metrics.conformal import (
    Answers,
    conformal_answers,
    conformal_summary,
    join_answers,
    node_contains,
    slides_needed,
)
from hmil_fast.training.run_folder import (
    Prediction,
    Run,
    read_predictions,
    stack_probabilities,
    write_csv,
)

Held = list[list[Prediction]]  # per fold


def read_validation(run: Run) -> Held | None:
    """Predictions of the validation slides per fold; None where a fold has none.

    Raises:
        UsageError: A file is damaged.
    """
    paths = [run.val_path(fold) for fold in range(len(run.folds))]
    if not all(path.exists() for path in paths):
        return None
    held_out = [read_predictions(path, run.tree) for path in paths]
    return held_out if all(held_out) else None


def calibration(run: Run, predictions: Sequence[Prediction], held_out: Held) -> dict[str, Any]:
    """Calibration of the test predictions, before and after a temperature per fold and level.

    Where the coarse levels are sums of the leaves, the temperature of the leaves serves them too:
    they stay sums.

    Returns:
        ``{"slides": [validation slides per fold], "levels": {"0": {"temperature": [per fold],
        "before": {"ece", "ece_adaptive", "brier", "nll"}, "after": the same}}}``.
    """
    nodes = run.tree.ancestors()
    temperatures, mended, before, truths = [], [], [], []
    for fold, slides in enumerate(held_out):
        mine = [p for p in predictions if p.fold == fold]
        y = nodes[:, _leaves(run, slides)]
        levels = stack_probabilities(slides)
        fitted = [fit_temperature(y[l], p) for l, p in enumerate(levels)]
        if run.sums:
            fitted = [fitted[-1]] * len(fitted)
        temperatures.append(fitted)
        if not mine:
            continue
        levels = stack_probabilities(mine)
        after = [with_temperature(p, t) for p, t in zip(levels, fitted, strict=True)]
        if run.sums:
            after = [*summed(run.tree, after[-1]), after[-1]]
        before.append(levels)
        mended.append(after)
        truths.append(nodes[:, _leaves(run, mine)])
    y = np.concatenate(truths, axis=1)
    return {
        "slides": [len(slides) for slides in held_out],
        "levels": {
            str(level): {
                "temperature": [fitted[level] for fitted in temperatures],
                "before": calibration_scores(y[level], np.concatenate([b[level] for b in before])),
                "after": calibration_scores(y[level], np.concatenate([m[level] for m in mended])),
            }
            for level in range(run.tree.num_levels)
        },
    }


def conformal(
    run: Run, predictions: Sequence[Prediction], held_out: Held, risk: float
) -> tuple[dict[str, Any], list[Prediction], Answers]:
    """Answers for the test slides that meet a risk, and what they are worth.

    The probabilities are taken as they are: a temperature fitted on the same slides would be
    tested by itself.

    Returns:
        ``{"risk", "slides": [validation slides per fold], "needed": fewest for this risk, "note",
        **conformal_summary}``, and the predictions with their answers in the same order.
    """
    needed = slides_needed(risk)
    order, parts = [], []
    for fold, slides in enumerate(held_out):
        mine = [p for p in predictions if p.fold == fold]
        if mine:
            known = _leaves(run, slides), stack_probabilities(slides)[-1]
            order += mine
            parts.append(conformal_answers(run.tree, known, stack_probabilities(mine)[-1], risk))
    answers = join_answers(parts)
    few = sum(len(slides) < needed for slides in held_out)
    note = (
        "fitted on the validation slides of each fold, which also chose its epoch, and slides of "
        "a patient are not independent: the coverage seen is the one to go by"
    )
    if few:
        note = (
            f"{few} of {len(held_out)} folds have fewer than the {needed} validation slides that "
            f"a risk of {risk:g} needs: there every answer is the root, every set is full; " + note
        )
    summary = conformal_summary(
        run.tree,
        _leaves(run, order),
        answers,
        [p.patient_id for p in order],
        (1000, run.config.seed),
    )
    head = {"risk": risk, "slides": [len(s) for s in held_out], "needed": needed, "note": note}
    return head | summary, order, answers


def write_answers(run: Run, predictions: Sequence[Prediction], answers: Answers) -> None:
    """Write conformal.csv: per test slide the answered node and the sets of leaves."""
    right = node_contains(run.tree, answers.level, answers.node, _leaves(run, predictions))
    rows: list[list[object]] = [
        ["slide_id", "patient_id", "fold", "label", "node", "level", "right", "lac", "aps"]
    ]
    for i, (p, *said) in enumerate(zip(predictions, *_in_words(run, answers), strict=True)):
        node, level, *sets = said
        rows.append([p.slide_id, p.patient_id, p.fold, p.label, node, level, int(right[i]), *sets])
    write_csv(run.path / "conformal.csv", rows)


def answer_new_slides(
    run: Run, predictions: Sequence[Prediction], risk: float
) -> dict[str, list[object]]:
    """Answers for slides that the run has not seen, as columns of a table.

    They are calibrated on the slides that the run tested, each by the fold that had not seen it.
    For a new slide the mean of all folds speaks, so the risk is met by approximation only.

    Returns:
        ``node`` ("" for the root), ``level`` (−1 for the root) and ``leaves``, the set of LAC.
    """
    tested = read_predictions(run.path / "predictions.csv", run.tree)
    known = _leaves(run, tested), stack_probabilities(tested)[-1]
    p = stack_probabilities(predictions)[-1]
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
