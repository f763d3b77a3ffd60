"""What training prints at its end; goes once `train` takes typed arguments."""

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hmil_fast.api.opening import run_features as features_of_run
from hmil_fast.bags.cache import FeatureCache
from hmil_fast.evaluation.evaluate import read_metrics
from hmil_fast.evaluation.tables import metric_rows
from hmil_fast.io.store import FeatureStore
from hmil_fast.runs.run import Run
from hmil_fast.training import distributed


def print_table(run: Run) -> None:
    """Print the run's results beside its baseline's."""
    metrics = read_metrics(run)
    head, rows = metric_rows(metrics)
    pooled = metrics["pooled"]
    title = f"{pooled['slides']} slides of {pooled['patients']} patients, [95 % interval]"
    table = Table(*head, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.no_wrap = True
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    if "conformal" in metrics:
        console.print(f"conformal answers: {metrics['conformal']['note']}", markup=False)


def console() -> Console:
    """Where people are told what happens; of several processes only the first one speaks."""
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=distributed.rank() > 0)


def notes(err: Console) -> Callable[[str], None]:
    """A function that prints a note."""

    def say(line: str) -> None:
        err.print(f"[yellow]note:[/] {escape(line)}")

    return say


def run_features(store: FeatureStore, run: Run, err: Console, views: int = 0) -> FeatureCache:
    """The features of a run's slides, where its settings want them."""
    cache = features_of_run(store, run, notes(err), views)
    err.print(f"features: {cache.describe()}")
    return cache
