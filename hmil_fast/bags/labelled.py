"""Match labelled slides with those of a store; report unmatched slides and empty bags."""

from collections.abc import Sequence
from dataclasses import replace

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.match_names import match_slides
from hmil_fast.bags.splits import Slide
from hmil_fast.errors import UsageError, some
from hmil_fast.io.store import FeatureStore
from hmil_fast.tables import Say


def with_features(store: FeatureStore, slides: Sequence[Slide], say: Say) -> list[Slide]:
    """Return the labelled slides that the store holds, under its names; report all others."""
    stored = store.slide_ids()
    matched = match_slides([slide.slide_id for slide in slides], stored)
    if not matched:
        raise UsageError(
            f"none of the {len(slides)} labelled slides is in the store {store.path} "
            f"(labels name for instance {slides[0].slide_id!r}, "
            f"the store {stored[0]!r})" if slides and stored else "no slides, or no labels",
            "make the slide_id column agree with `hmil-fast store info`, or extract the slides",
        )  # fmt: skip
    renamed = [f"{name!r} is {other!r}" for name, other in matched.items() if name != other]
    if renamed:
        say(f"{len(renamed)} slides have another name in the store: {some(renamed)}")
    missing = [slide.slide_id for slide in slides if slide.slide_id not in matched]
    if missing:
        say(f"{len(missing)} labelled slides are not in the store: {some(missing)}")
    labelled = set(matched.values())
    unlabelled = [slide_id for slide_id in stored if slide_id not in labelled]
    if unlabelled:
        say(f"{len(unlabelled)} slides of the store have no label here: {some(unlabelled)}")
    present = []
    for slide in slides:
        if slide.slide_id in matched:
            name = matched[slide.slide_id]
            alone = slide.patient_id == slide.slide_id  # the slide counts as a patient
            patient = name if alone else slide.patient_id
            present.append(replace(slide, slide_id=name, patient_id=patient))
    return present


def name_empty(cache: FeatureCache, say: Say) -> None:
    """Report the slides whose bags are empty, by reason."""
    empty = [i for i in range(len(cache.slide_ids)) if not cache.lengths[i]]
    for why, spoilt in (
        ("no tissue tiles", False),
        ("only tiles that could not be decoded, or rows that are not finite", True),
    ):
        ids = [cache.slide_ids[i] for i in empty if (cache.good_tiles(i) is not None) == spoilt]
        if ids:
            say(f"{len(ids)} slides have {why}, their bags are empty: {some(ids)}")
