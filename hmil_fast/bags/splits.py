"""Make cross-validation folds: which slides train, validate and test."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from hmil_fast.bags.fold import Fold, check_folds
from hmil_fast.bags.label_file import Slide, read_labels
from hmil_fast.bags.manifest import read_splits, write_splits
from hmil_fast.columns import PARTS
from hmil_fast.errors import UsageError

__all__ = [
    "Fold",
    "Slide",
    "cut_validation",
    "make_folds",
    "read_labels",
    "read_splits",
    "write_splits",
]


def make_folds(slides: Sequence[Slide], k: int, seed: int, val_fraction: float) -> list[Fold]:
    """Split by patient, stratified by leaf; every slide is tested exactly once.

    With an official split (`Slide.split`) there is one fold, k is not used, and every slide of the
    part ``test`` is tested once. Where the slides name the folds that test them, these are the
    folds. A validation part is cut out of the training part the same way, unless the official split
    has one.

    Args:
        slides: All slides.
        k: Number of folds, at least 2.
        seed: Seed; equal arguments give equal folds.
        val_fraction: Share of the training part used for validation, in [0, 0.5]; 0 for none.

    Raises:
        UsageError: A class has too few patients, the official split has no train or test part, or
            only one fold is named.
    """
    if not 0 <= val_fraction <= 0.5:
        raise UsageError(
            f"val_fraction is {val_fraction}", "choose a share between 0 and 0.5, for instance 0.15"
        )
    named = {s.split for s in slides if s.split}
    if named & set(PARTS):
        return [_official_fold(slides, seed, val_fraction)]
    if named:
        return _named_folds(slides, seed, val_fraction)
    if k < 2:
        raise UsageError(f"folds is {k}", "choose at least 2, or add a split column to the labels")
    by_label = _patients_by_label(slides)
    label = min(sorted(by_label), key=lambda name: len(by_label[name]), default="")
    patients = len(by_label.get(label, ()))
    if by_label and patients < k:
        count = sum(s.label == label for s in slides)
        raise UsageError(
            f"class {label!r} has {patients} patients ({count} slides), too few for {k} folds",
            f"use --folds {patients}"
            if patients > 1
            else f"add patients of {label!r}, merge it with a sibling in the tree, or leave "
            "its slides out",
        )
    folds = _folds_of(slides, _stratified_parts(slides, k, seed), seed, val_fraction)
    check_folds(folds, slides, "the folds")
    return folds


def _folds_of(
    slides: Sequence[Slide], tests: Sequence[set[int]], seed: int, val_fraction: float
) -> list[Fold]:
    """A fold for each set of positions to test; a validation part is cut out of the rest."""
    folds = []
    for number, test in enumerate(tests):
        rest = [s for i, s in enumerate(slides) if i not in test]
        train, val = cut_validation(rest, seed + 1 + number, val_fraction)
        folds.append(Fold(train, val, tuple(slides[i].slide_id for i in sorted(test))))
    return folds


def _patients_by_label(slides: Iterable[Slide]) -> dict[str, set[str]]:
    patients: dict[str, set[str]] = defaultdict(set)
    for slide in slides:
        patients[slide.label].add(slide.patient_id)
    return patients


def _stratified_parts(slides: Sequence[Slide], k: int, seed: int) -> list[set[int]]:
    """Positions of the slides in k parts that share no patient and have alike class shares."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(n_splits=k, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # it warns of rare classes; we check them ourselves
        warnings.simplefilter("ignore", UserWarning)
        return [
            {int(i) for i in part}
            for _, part in splitter.split(
                np.zeros(len(slides)),
                [s.label for s in slides],
                groups=[s.patient_id for s in slides],
            )
        ]


def cut_validation(
    slides: Sequence[Slide], seed: int, fraction: float
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Cut a validation part out of slides to train on, by patient.

    Returns:
        Train and validation ids; of the candidate parts the one whose class shares fit best.

    Raises:
        UsageError: No patient can be spared.
    """
    if fraction == 0:
        return tuple(s.slide_id for s in slides), ()
    # a patient who alone carries a class stays in training
    needed = {next(iter(p)) for p in _patients_by_label(slides).values() if len(p) == 1}
    free = [s for s in slides if s.patient_id not in needed]
    by_label = _patients_by_label(free)
    # the splitter wants one class with a patient per part
    parts = min(max(2, round(1 / fraction)), max(map(len, by_label.values()), default=0))
    labels = sorted(by_label)
    counts = np.array([sum(s.label == label for s in slides) for label in labels])
    best: tuple[float, set[str]] | None = None
    for part in _stratified_parts(free, parts, seed) if parts > 1 else ():
        held = [free[i].label for i in part]
        taken = np.array([held.count(label) for label in labels])
        gap = float(np.abs(taken / counts - fraction).sum())
        if part and (taken < counts).all() and (best is None or gap < best[0]):
            best = gap, {free[i].slide_id for i in part}
    if best is None:
        raise UsageError(
            f"no patient of the {len(slides)} slides to train on can be held back for validation "
            "without losing a class",
            "use fewer folds, add patients, or name val slides in a split column",
        )
    ids = [s.slide_id for s in slides]
    return tuple(i for i in ids if i not in best[1]), tuple(i for i in ids if i in best[1])


def _official_fold(slides: Sequence[Slide], seed: int, val_fraction: float) -> Fold:
    parts = {name: [s for s in slides if s.split == name] for name in PARTS}
    for name in ("train", "test"):
        if not parts[name]:
            raise UsageError(
                f"the split column names no {name} slides",
                "name some, or remove the column for cross-validation",
            )
    train = tuple(s.slide_id for s in parts["train"])
    val = tuple(s.slide_id for s in parts["val"])
    if not val:
        train, val = cut_validation(parts["train"], seed, val_fraction)
    fold = Fold(train, val, tuple(s.slide_id for s in parts["test"]))
    check_folds([fold], slides, "the split column")
    return fold


def _named_folds(slides: Sequence[Slide], seed: int, val_fraction: float) -> list[Fold]:
    names = sorted({str(s.split) for s in slides}, key=int)
    if len(names) < 2:
        raise UsageError(
            f"the fold column names one fold only ({names[0]})",
            "name at least two, or remove the column for cross-validation",
        )
    tests = [{i for i, s in enumerate(slides) if s.split == name} for name in names]
    folds = _folds_of(slides, tests, seed, val_fraction)
    check_folds(folds, slides, "the fold column")
    return folds
