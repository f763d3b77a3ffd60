"""Choose the folds of a run: make them or take them from a manifest, and check them."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.duplicates import near_duplicates, same_features
from hmil_fast.bags.fold import Fold, check_folds, separated_pairs
from hmil_fast.bags.manifest import (
    Manifest,
    labels_digest,
    read_manifest,
    sources,
    versions,
)
from hmil_fast.bags.match_names import alike, match_slides
from hmil_fast.bags.splits import Slide, cut_validation, make_folds
from hmil_fast.columns import PARTS
from hmil_fast.config import TrainConfig
from hmil_fast.errors import UsageError, some
from hmil_fast.io.store import FeatureStore
from hmil_fast.labels import LabelTree
from hmil_fast.training.standardise import WIDE_RATIO, column_ratio

Say = Callable[[str], None]
Split = tuple[list[Fold], list[Slide]]


def choose_folds(
    store: FeatureStore,
    slides: Sequence[Slide],
    tree: LabelTree,
    config: TrainConfig,
    manifest: Path | None,
    say: Say,
    run: Path | None = None,
) -> Split:
    """The folds of a run and the slides in them; those of a run that is resumed are kept.

    Args:
        store: The store, which has all the slides.
        slides: Labelled slides.
        tree: The label tree.
        config: Settings: folds, seed, val_fraction.
        manifest: A splits.json to take as it is; only a missing validation part is cut out of the
            training part.
        say: Called with a line for people.
        run: Folder of the run, which may have been set up before, in other versions.

    Raises:
        UsageError: A slide of the manifest is unknown; a slide, its copy or its patient lies in
            two parts of a fold; a leaf has no slide to train on.
    """
    chosen = list(slides)
    before = _set_up_before(run)
    if manifest is not None:
        folds, chosen = _from_manifest(store, chosen, tree, config, manifest, say)
        if before is not None and not _same_but_for_validation(before.folds, folds):
            before = None
    if before is not None and labels_digest(before.slides) == labels_digest(chosen):
        folds, chosen = before.folds, before.slides
        now = versions()
        other = [f"{k} {v} (now {now[k]})" for k, v in before.made_with.items() if now.get(k) != v]
        if other:
            say(f"the folds of {run} were made with {', '.join(other)}; they are kept")
    elif manifest is None:
        folds = make_folds(chosen, config.folds, config.seed, config.val_fraction)
    if len(folds) != config.folds:
        say(f"folds={config.folds} is not used: the splits have {len(folds)}")
    _check_leaves(tree, folds, chosen, say)
    _check_validation(folds, chosen, say)
    copies = separated_pairs(folds, same_features(store, [slide.slide_id for slide in chosen]))
    if copies:
        raise UsageError(
            f"{len(copies)} pairs of slides have the very same features and lie in different parts "
            f"of a fold: {some(copies)}",
            "leave one of each pair out of the labels, or give both the same patient_id",
        )
    return folds, chosen


def _set_up_before(run: Path | None) -> Manifest | None:
    """The manifest of a run folder that is set up."""
    if run is None or not (run / "config.yaml").exists():
        return None
    return read_manifest(run / "splits.json")


def _same_but_for_validation(a: Sequence[Fold], b: Sequence[Fold]) -> bool:
    return [(f.test, {*f.train, *f.val}) for f in a] == [(f.test, {*f.train, *f.val}) for f in b]


def warn_of_near_duplicates(folds: Sequence[Fold], cache: FeatureCache, say: Say) -> None:
    """Name slides in different parts of a fold whose mean features are almost the same."""
    filled = [i for i in range(len(cache.slide_ids)) if cache.lengths[i]]
    if len(filled) < 3:
        return
    if cache.tier.name == "stream":
        say("slides that are almost the same are not looked for: it would read the store once more")
        return
    means = torch.stack([cache.bag(i).mean(0, dtype=torch.float32).cpu() for i in filled])
    if column_ratio(means) >= WIDE_RATIO:  # else the largest column decides alone
        means = (means - means.mean(0)) / means.std(0).clamp_min(torch.finfo().tiny)
    pairs = separated_pairs(
        folds, near_duplicates(means.numpy(), [cache.slide_ids[i] for i in filled])
    )
    if pairs:
        say(
            f"{len(pairs)} pairs of slides in different parts of a fold have almost the same mean "
            f"feature; are they of one patient? {some(pairs)}"
        )


def _from_manifest(
    store: FeatureStore,
    slides: list[Slide],
    tree: LabelTree,
    config: TrainConfig,
    path: Path,
    say: Say,
) -> Split:
    manifest = _by_the_labels_names(read_manifest(path), slides, path, say)
    known = {slide.slide_id: slide for slide in slides}
    used = dict.fromkeys(slide_id for fold in manifest.folds for slide_id in fold.parts())
    unknown = [slide_id for slide_id in used if slide_id not in known]
    if unknown:
        raise UsageError(
            f"{len(unknown)} of {len(used)} slides of {path} lack a label or features: "
            f"{some(unknown)}",
            "label and extract them, or take them out of the split and import it anew",
        )
    left_out = [slide_id for slide_id in known if slide_id not in used]
    if left_out:
        say(f"{len(left_out)} labelled slides are in no fold of {path}: {some(left_out)}")
    chosen = [slide for slide in slides if slide.slide_id in used]
    for what in ("label", "patient_id"):
        unlike = [
            slide.slide_id
            for slide in manifest.slides
            if slide.slide_id in used
            and getattr(slide, what) not in ("", getattr(known[slide.slide_id], what))
        ]
        if unlike:
            say(f"{len(unlike)} slides have another {what} than in {path}: {some(unlike)}")
    now = sources(tree, chosen, store)
    changed = [
        name
        for name in ("tree", "store", "features")
        if manifest.made_from.get(name, now[name]) != now[name]
    ]
    if changed:
        say(f"{path} was made with another {', '.join(changed)}; the folds are used as they are")
    if len(manifest.folds) > 1:
        say(tested_text(manifest.folds, len(used)))
    check_folds(manifest.folds, chosen, str(path))
    folds = []
    for number, fold in enumerate(manifest.folds):
        if not fold.val:
            say(f"fold {number} has no validation part, one is cut out of its training part")
            train = [known[slide_id] for slide_id in fold.train]
            seed = config.seed + 1 + number
            folds.append(Fold(*cut_validation(train, seed, config.val_fraction), fold.test))
        else:
            folds.append(fold)
    return folds, chosen


def _by_the_labels_names(
    manifest: Manifest, slides: Sequence[Slide], path: Path, say: Say
) -> Manifest:
    """The manifest with slides named as in the labels; a patient stands for all of his slides."""
    used = list(dict.fromkeys(slide_id for fold in manifest.folds for slide_id in fold.parts()))
    found = match_slides(used, [slide.slide_id for slide in slides])
    renamed = [f"{name!r} is {other!r}" for name, other in found.items() if name != other]
    if renamed:
        say(f"{len(renamed)} slides of {path} have another name in the labels: {some(renamed)}")
    names = {name: [other] for name, other in found.items()}
    of_patient = defaultdict[str, list[str]](list)
    for slide in slides:
        of_patient[alike(slide.patient_id)].append(slide.slide_id)
    patients = [name for name in used if name not in found and alike(name) in of_patient]
    if patients:
        names |= {name: of_patient[alike(name)] for name in patients}
        say(
            f"{len(patients)} names in {path} are patients of the labels, each stands for all "
            f"slides of the patient: {some(patients)}"
        )

    def of_labels(part: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(other for name in part for other in names.get(name, [name])))

    return dataclasses.replace(
        manifest,
        folds=[
            Fold(*(of_labels(getattr(fold, part)) for part in PARTS)) for fold in manifest.folds
        ],
        slides=[
            dataclasses.replace(slide, slide_id=other)
            for slide in manifest.slides
            for other in names.get(slide.slide_id, [slide.slide_id])
        ],
    )


def _check_leaves(
    tree: LabelTree, folds: Sequence[Fold], slides: Sequence[Slide], say: Say
) -> None:
    """Every leaf needs slides to train on: none in any fold is an error, in some a warning."""
    label = {slide.slide_id: slide.label for slide in slides}
    counts = [
        {part: Counter(label[s] for s in getattr(fold, part)) for part in ("train", "val", "test")}
        for fold in folds
    ]
    never = []
    for leaf in tree.leaves:
        lacking = [number for number, count in enumerate(counts) if not count["train"][leaf]]
        if not lacking:
            continue
        shown = "; ".join(
            f"fold {number}: "
            + ", ".join(f"{part} {c[leaf]}" for part, c in counts[number].items())
            for number in lacking
        )
        if len(lacking) == len(folds):
            never.append(f"{leaf!r} ({shown})")
        else:
            say(f"leaf {leaf!r} has no slide to train on in {len(lacking)} folds: {shown}")
    if never:
        raise UsageError(
            f"no fold has a slide to train on of leaf {', '.join(never)}",
            "add slides with that label, move some to the training part, or take the leaf out of "
            "the tree",
        )


def _check_validation(folds: Sequence[Fold], slides: Sequence[Slide], say: Say) -> None:
    """Name the folds whose validation part cannot tell a good epoch from a bad one."""
    label = {slide.slide_id: slide.label for slide in slides}
    weak = []
    for number, fold in enumerate(folds):
        if len(fold.val) == 1:
            weak.append(f"fold {number}: one slide ({fold.val[0]})")
        elif len({label[slide_id] for slide_id in fold.val}) == 1:
            weak.append(f"fold {number}: {len(fold.val)} slides, all {label[fold.val[0]]!r}")
    if weak:
        say(
            f"{len(weak)} of {len(folds)} validation parts are too small to choose an epoch by "
            f"({some(weak)}): use fewer folds, a larger val_fraction, or name val slides"
        )


def tested_text(folds: Sequence[Fold], slides: int) -> str:
    """Say how many slides are tested, and how many of them in several folds."""
    often = Counter(slide_id for fold in folds for slide_id in fold.test)
    several = sum(count > 1 for count in often.values())
    text = f"{len(often)} of {slides} slides are tested"
    if several:
        text += (
            f", {several} of them in several folds: pooled metrics count a slide once for every "
            "fold that tests it"
        )
    return text
