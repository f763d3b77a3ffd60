"""`hmil-fast demo`: extract, train, evaluate and report on the cohort in the package."""

from pathlib import Path

from hmil_fast.api.extract import JobOptions, extract
from hmil_fast.api.train import train
from hmil_fast.cli.console import stderr, track_slides
from hmil_fast.cli.extract_output import print_summary
from hmil_fast.cli.job_bar import JobBar
from hmil_fast.cli.tables import print_metrics
from hmil_fast.cli.training_bar import TrainingBar
from hmil_fast.config import Recipe, TrainConfig
from hmil_fast.demo.cohort import MPP, TILE, write_cohort
from hmil_fast.evaluation.evaluate import read_metrics
from hmil_fast.io.tiles.grid import TileSpec
from hmil_fast.report.html.page import write_report
from hmil_fast.report.viewer_data import make_views

# for 40 training slides: a quarter of the published width, larger steps, and dropout;
# no weight decay, since 60 epochs of the baseline are too few with it
CONFIG = TrainConfig(
    recipe=Recipe(hidden=64, dropout=0.25, weight_decay=0.0, batch_bags=13, epochs=60)
)


def demo(out: Path) -> int:
    """Extract, train, evaluate, draw and report; run again, it resumes. Returns the exit code."""
    cohort = write_cohort(out / "cohort")
    err = stderr()
    with JobBar(err) as bar:
        summary = extract(
            cohort / "slides",
            out / "store",
            TileSpec(tile_px=TILE, mpp=MPP),
            options=JobOptions(preflight=False),
            report=bar.update,
        )
    print_summary(summary, err)
    if summary.failed:
        return 1
    store = summary.store
    with TrainingBar(err) as training_bar:
        tables = (cohort / "labels.csv", cohort / "tree.yaml")
        run = train(store, *tables, out / "run", CONFIG, report=training_bar.update)
    make_views(run, store, len(run.slides), say=training_bar.note, track=track_slides)
    report = write_report(run.path)
    print_metrics(read_metrics(run))
    print(f"slides     {cohort / 'slides'}")
    print(f"tissue     {store.path / 'overlays'}")
    print(f"report     {report}")
    return 0
