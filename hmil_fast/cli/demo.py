"""`hmil-fast demo`: extract, train, evaluate and report on the cohort in the package."""

from pathlib import Path

from hmil_fast.api.extract import run_job
from hmil_fast.api.train import train
from hmil_fast.cli.console import stderr
from hmil_fast.cli.tables import print_metrics
from hmil_fast.cli.training_bar import TrainingBar
from hmil_fast.config import Recipe, TrainConfig
from hmil_fast.demo.cohort import MPP, TILE, write_cohort
from hmil_fast.device import pick_device
from hmil_fast.evaluation.evaluate import read_metrics
from hmil_fast.extraction.encoders import DEFAULT_ENCODER, load_encoder
from hmil_fast.extraction.pipeline.extractor import Extractor, store_spec
from hmil_fast.extraction.slides import collect_slides
from hmil_fast.io.store import create_store
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
    spec = TileSpec(tile_px=TILE, mpp=MPP)
    encoder = load_encoder(DEFAULT_ENCODER, None, pick_device("auto"))
    store = create_store(out / "store", store_spec(encoder, spec, "float16"))
    if run_job(collect_slides([str(cohort / "slides")]), Extractor(store, encoder, spec)):
        return 1
    with TrainingBar(stderr()) as bar:
        tables = (cohort / "labels.csv", cohort / "tree.yaml")
        run = train(store, *tables, out / "run", CONFIG, report=bar.update)
    make_views(run, store, len(run.slides))
    report = write_report(run.path)
    print_metrics(read_metrics(run))
    print(f"slides     {cohort / 'slides'}")
    print(f"tissue     {store.path / 'overlays'}")
    print(f"report     {report}")
    return 0
