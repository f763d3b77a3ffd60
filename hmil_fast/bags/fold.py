"""Fold, and the check that no slide and no patient is in two of its parts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hmil_fast.bags.label_file import Slide
from hmil_fast.columns import PARTS
from hmil_fast.errors import UsageError


@dataclass(frozen=True)
class Fold:
    """The slide ids of one training run; `test` is looked at once, `val` selects the epoch."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def parts(self) -> dict[str, str]:
        """The part of every slide; of a slide in two, the last."""
        return {slide_id: part for part in PARTS for slide_id in getattr(self, part)}


def check_folds(folds: Sequence[Fold], slides: Sequence[Slide], where: str) -> None:
    """No slide and no patient in two parts of a fold, none unknown, and some to train on and test.

    A slide may be tested in several folds, as those of Monte-Carlo splits are, but `make_folds`
    makes no such folds. Slides of an unknown patient ("") are not checked for theirs.

    Args:
        folds: The folds.
        slides: All slides they may name.
        where: What to call the folds in an error.

    Raises:
        UsageError: Names the fold, the slide or patient and the parts.
    """
    patient = {s.slide_id: s.patient_id for s in slides}
    if len(patient) < len(slides):
        raise UsageError(f"{where}: a slide is listed twice", "keep one entry per slide")
    if not folds:
        raise UsageError(f"{where} has no folds", "name at least one")
    for number, fold in enumerate(folds):
        for name in ("train", "test"):
            if not getattr(fold, name):
                raise UsageError(
                    f"{where}: fold {number} has no {name} slides", "name some, or drop the fold"
                )
        part_of: dict[str, str] = {}
        patient_part: dict[str, str] = {}
        for name in PARTS:
            for slide_id in getattr(fold, name):
                if slide_id not in patient:
                    raise UsageError(
                        f"{where}: fold {number} names slide {slide_id!r}, which has no label",
                        "add it to the labels, or remove it from the fold",
                    )
                if slide_id in part_of:
                    raise UsageError(
                        f"{where}: fold {number} has slide {slide_id!r} in {part_of[slide_id]} "
                        f"and in {name}",
                        "keep it in one part",
                    )
                part_of[slide_id] = name
                if not patient[slide_id]:
                    continue
                other = patient_part.setdefault(patient[slide_id], name)
                if other != name:
                    raise UsageError(
                        f"{where}: fold {number} has patient {patient[slide_id]!r} in {other} and "
                        f"in {name}",
                        "put all slides of a patient in one part",
                    )


def separated_pairs(folds: Sequence[Fold], pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Describe the pairs whose two slides lie in different parts of a fold."""
    separated = []
    everywhere = [fold.parts() for fold in folds]
    for a, b in pairs:
        for number, parts in enumerate(everywhere):
            if a in parts and b in parts and parts[a] != parts[b]:
                separated.append(f"{a} ({parts[a]}) and {b} ({parts[b]}) in fold {number}")
                break
    return separated
