"""Predict slides of a store with a trained run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from hmil_fast.api.opening import as_run, as_store
from hmil_fast.bags.cache import FeatureCache
from hmil_fast.config import Runtime
from hmil_fast.errors import UsageError
from hmil_fast.evaluation.predict import predict_slides
from hmil_fast.evaluation.prior import Prior, resolve_prior
from hmil_fast.evaluation.uncertainty import answer_new_slides
from hmil_fast.io.store import FeatureStore
from hmil_fast.io.store.location import Location
from hmil_fast.labels import LabelTree
from hmil_fast.runs.predictions import Prediction, prediction_columns, write_predictions
from hmil_fast.runs.run import Run
from hmil_fast.tables import Say, quiet


@dataclass(frozen=True)
class Predictions:
    """Predictions of slides, in the order in which the slides were asked for.

    Attributes:
        tree: The label tree of the run.
        slides: The prediction of each slide.
        answers: Per slide the conformal ``node``, its ``level`` and the set of ``leaves``; empty
            without alpha.
    """

    tree: LabelTree
    slides: Sequence[Prediction]
    answers: Mapping[str, Sequence[object]] = field(default_factory=dict)

    def columns(self) -> dict[str, list[object]]:
        """The columns of predictions.csv by name, for instance for `pandas.DataFrame`."""
        return prediction_columns(self.tree, self.slides, self.answers)

    def write(self, to: Path | TextIO) -> None:
        """Write them as CSV, one row a slide.

        Raises:
            UsageError: The file cannot be written.
        """
        write_predictions(to, self.tree, self.slides, self.answers)


def predict(
    run: Run | Path | str,
    store: FeatureStore | Location | str,
    slide_ids: Sequence[str] | None = None,
    *,
    prior: Prior | str | None = None,
    alpha: float | None = None,
    runtime: Runtime = Runtime(),
    say: Say = quiet,
) -> Predictions:
    """Predict slides of a store.

    A slide that the run tested is predicted by the fold that tested it, any other slide by the mean
    of all folds.

    Args:
        run: A trained run, or its folder.
        store: A store with features like those that the run was trained on, or its place.
        slide_ids: Slides of the store; by default all.
        prior: How frequent each leaf is: "balanced", "cohort", a CSV file with the columns
            ``label,share``, or a `Prior`; by default that of the run's last evaluation.
        alpha: Error rate allowed for conformal predictions, in (0, 1), which adds `answers`.
        runtime: Device and precision.
        say: Called with each note: slides left out, changed, or known to the run.

    Raises:
        UsageError: No such run or prior, no slides, or features of another kind.
        StoreError: No such store or slide, or a damaged one.

    Example:
        >>> import hmil_fast
        >>> predictions = hmil_fast.predict("run", "features", ["s00"], alpha=0.1)
        >>> predictions.slides[0].probabilities[-1].shape  # of the leaves
        (3,)
    """
    run = as_run(run)
    store = as_store(run, store, say)
    slide_ids = list(dict.fromkeys(slide_ids or ())) or store.slide_ids()
    for name in sorted(store.unnamed):
        say(f"{name} is left out: its commit cannot be read, see `hmil-fast store verify`")
    if not slide_ids:
        raise UsageError(f"the store {store.path} holds no slide", "extract some first")
    tested = {slide_id for fold in run.folds for slide_id in fold.test}
    trained_on = {slide_id for fold in run.folds for slide_id in fold.parts()} - tested
    if count := sum(slide_id in trained_on for slide_id in slide_ids):
        say(
            f"{count} of these slides were used to train the run and are tested by no fold: their "
            "predictions and conformal answers are better than those of new slides"
        )
    prior = resolve_prior(run, prior)
    predictions = predict_slides(run, FeatureCache(store, slide_ids, run.path), prior, runtime)
    answers = {} if alpha is None else answer_new_slides(run, predictions, prior, alpha)
    return Predictions(run.tree, predictions, answers)
