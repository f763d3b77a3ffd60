"""Draw what a run predicts: the heatmap of one slide, the report of all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hmil_fast.api.opening import as_run, as_store, slide_files
from hmil_fast.config import Runtime
from hmil_fast.errors import UsageError
from hmil_fast.evaluation.evaluate import EvaluationOptions, evaluate_run, read_metrics
from hmil_fast.evaluation.prior import Prior, resolve_prior
from hmil_fast.io.store import FeatureStore
from hmil_fast.io.store.location import Location
from hmil_fast.report.heatmap import HeatmapOptions, draw_heatmap
from hmil_fast.report.html.page import write_report
from hmil_fast.report.viewer_data import Track, make_views, untracked
from hmil_fast.runs.predictions import Prediction
from hmil_fast.runs.run import Run
from hmil_fast.tables import Say, quiet


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows.

    Attributes:
        most_heatmaps: Add the heatmaps of at most this many slides to those already there.
        allow_missing: Write the report although the store lacks some of the run's slides.
        prior: How frequent each leaf is, as for `predict`; another one evaluates the run again.
    """

    most_heatmaps: int = 100
    allow_missing: bool = False
    prior: Prior | str | None = None


def heatmap(
    run: Run | Path | str,
    store: FeatureStore | Location | str,
    slide_id: str,
    out: Path | str,
    *,
    slides: Sequence[Path | str] = (),
    options: HeatmapOptions = HeatmapOptions(),
    runtime: Runtime = Runtime(),
    say: Say = quiet,
) -> Prediction:
    """Draw a slide's attention per node of the label tree; write a PNG.

    Args:
        run: A trained run of a model with attention, or its folder.
        store: A store that holds the slide, or its place.
        slide_id: The slide.
        out: The PNG.
        slides: Slide files, folders or globs to find the slide's file in: tiles are cut from it.
        options: Nodes, tiles and colours.
        runtime: Device and precision.
        say: Called with each note.

    Returns:
        The slide's prediction, made by the forward pass that is drawn.

    Raises:
        UsageError: No such run or node, the model has no attention, or the PNG cannot be written.
        StoreError: No such store or slide, or the slide has no tiles or no coordinates.
        SlideError: The slide's file cannot be opened, or is another slide's.

    Example:
        >>> import hmil_fast
        >>> prediction = hmil_fast.heatmap("run", "features", "s00", "s00.png")
        >>> prediction.slide_id
        's00'
    """
    run = as_run(run)
    file = slide_files(slides).get(slide_id) if slides else None
    store = as_store(run, store, say)
    if options.top_k is not None and file is None:
        raise UsageError(
            f"--top-k cuts tiles from the slide, and --slides names no slide {slide_id!r}",
            "give --slides the files or folders that were extracted",
        )
    prediction, notes = draw_heatmap(run, store, slide_id, Path(out), file, options, runtime)
    for note in notes:
        say(note)
    return prediction


def report(
    run: Run | Path | str,
    store: FeatureStore | Location | str | None = None,
    *,
    slides: Sequence[Path | str] = (),
    options: ReportOptions = ReportOptions(),
    runtime: Runtime = Runtime(),
    say: Say = quiet,
    track: Track = untracked,
) -> Path:
    """Write a run's report, one HTML file; with a store it shows the slides under their attention.

    Args:
        run: A trained run, or its folder.
        store: A store that holds the run's slides, or its place.
        slides: Slide files, folders or globs, as extracted: the tiles of the highest attention are
            cut from them. Needs a store.
        options: Number of heatmaps, prior, and whether slides may be missing.
        runtime: Device and precision.
        say: Called with each note.
        track: Shows the progress of a loop over slides.

    Returns:
        The report's path, RUN/report.html.

    Raises:
        UsageError: The run is not trained to its end, or the store or `slides` are of others.
        StoreError: No such store, or a damaged one.
    """
    run = as_run(run)
    files = slide_files(slides) if slides else {}
    prior = None if options.prior is None else resolve_prior(run, options.prior)
    if files and (store is None or not {slide.slide_id for slide in run.slides} & files.keys()):
        raise UsageError(
            "--slides cuts tiles of slides in the store, and there is no --store"
            if store is None
            else f"--slides names no slide of {run.path}, for instance {min(files)!r}",
            "give --store too, and the files or folders that were extracted",
        )
    if store is not None:
        store = as_store(run, store, say)
        _refuse_another_store(run, store, allow_missing=options.allow_missing)
    if prior is None:
        read_metrics(run)
    else:
        evaluate_run(run, EvaluationOptions(prior=prior))
    if store is not None:
        make_views(run, store, options.most_heatmaps, files, runtime, say, track)
    return write_report(run.path)


def _refuse_another_store(run: Run, store: FeatureStore, *, allow_missing: bool) -> None:
    """Refuse a store that holds none, or not all, of the slides that the run tested.

    Raises:
        UsageError: It is such a store.
    """
    tested = {slide_id for fold in run.folds for slide_id in fold.test}
    missing = sorted(tested - set(store.slide_ids()))
    if len(missing) == len(tested) or (missing and not allow_missing):
        raise UsageError(
            f"the store {store.path} lacks {len(missing)} of the {len(tested)} slides that "
            f"{run.path} tested, {missing[0]!r} for instance",
            "name the store that it was trained on, or leave out --store"
            + ("" if allow_missing else "; --allow-missing writes the report without these slides"),
        )
