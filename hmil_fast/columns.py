"""Recognise columns of tables by the names that people give them, and words for the parts."""

import re
import unicodedata
from collections.abc import Sequence

PARTS = ("train", "val", "test")

# Meaning, then spellings, the one to prefer first. A spelling is compared without case, spaces and
# punctuation: "Patient ID", "patient-id" and "PatientID" are all "patientid".
_PERSON = r"(patient|case|subject|participant|donor|individual|person|pat|subj)s?"
_NUMBER = r"(id|ids|identifier|uid|uuid|no|nr|num|number|name|code|key|barcode|index)?"
COLUMNS: dict[str, tuple[str, ...]] = {
    "path": (
        "path", "(slide|wsi|image|file)?(path|location)", "file|filename|slidefile|wsifile",
        "wsi|slide|image",
    ),
    "slide_id": (
        "slideid", "slide|slides|slidename|slidebarcode", "wsi|wsiid|wsiname", "imageid|imagename",
        "image|file|filename|fileid|slidefile|slidefilename|wsifile", "(slide|wsi|image|file)?path",
    ),
    "label": ("label", "labels|slidelabel", "class|target|diagnosis|category|subtype"),
    "patient_id": (
        "patientid", "(bcr|icgc|tcga|gdc|anon|study|id)?(patient|pat)s?(submitter)?" + _NUMBER,
        f"(bcr|icgc|tcga|gdc|anon|study|id|cases?)?{_PERSON}(submitter)?{_NUMBER}",
        "pid|ptid|mrn|medicalrecordnumber", "submitterid|casessubmitterid",
    ),
    # numbers in any of these are folds
    "split": (
        "split", "splits|splitname|officialsplit|datasplit|trainvaltest|traintest|traintestsplit",
        "set|subset|part|partition|phase|group|usage|dataset|datasetsplit|cohort|mode",
        "(cv|k|test)?folds?(id|no|nr|num|number|index|idx)?|cv|crossvalidation(fold)?",
    ),
    "share": ("share", "shares|prior|prevalence|frequency|count|counts|n"),
    "mpp": ("mpp", "(slide|level0)?mppx?|micronsperpixel|umperpx|umperpixel"),
}  # fmt: skip
# these are also names of other things: a column is one only if its cells say so
_SPLIT_IF_IT_NAMES_PARTS = COLUMNS["split"][2]
_PART_WORDS = {
    "train": "train|training|tr|trn|learning",
    "val": "val|valid|validation|dev|development|tune|tuning",
    "test": "test|testing|te|tst|holdout|heldout",
}
MISSING = {"", "nan", "na", "none", "null", "n/a", "<na>", "#n/a"}  # as programs write no value


def spelling(text: str) -> str:
    """A name without case, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())


def part_of(text: str) -> str | None:
    """The part that a word such as Training or test_set names; None for other words."""
    word = re.sub("(set|split|slides|data|part)$", "", spelling(text))
    return next((part for part, words in _PART_WORDS.items() if re.fullmatch(words, word)), None)


def find_columns(
    header: Sequence[str], meaning: str, cells: Sequence[Sequence[str]] = ()
) -> list[int]:
    """The columns with a meaning, the one to use first.

    Args:
        header: Names of the columns.
        meaning: A key of `COLUMNS`.
        cells: The rows below, a column named "group" is a split if some of its cells are train.
    """
    matches: list[tuple[int, int]] = []
    for rank, pattern in enumerate(COLUMNS[meaning]):
        for place, name in enumerate(header):
            named = bool(re.fullmatch(pattern, spelling(name)))
            if named and pattern == _SPLIT_IF_IT_NAMES_PARTS:
                named = "train" in map(part_of, {row[place] for row in cells})
            if named and all(place != other for _, other in matches):
                matches.append((rank, place))
    return [place for _, place in matches]


def is_known(name: str) -> bool:
    """Whether a column of this name has a meaning, or lists the slides of a part."""
    return bool(part_of(name)) or any(
        re.fullmatch(pattern, spelling(name)) for names in COLUMNS.values() for pattern in names
    )
