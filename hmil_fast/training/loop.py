"""Train the folds of a run, one after the other."""

from collections.abc import Callable
from typing import TextIO

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.config import Runtime
from hmil_fast.errors import Stopped
from hmil_fast.files import sweep_partials
from hmil_fast.runs.lock import own_log
from hmil_fast.runs.predictions import run_predictions, write_predictions
from hmil_fast.runs.run import Run
from hmil_fast.training import distributed
from hmil_fast.training.fold import EpochReport, FoldTrainer
from hmil_fast.training.signals import stop_flag

__all__ = ["EpochReport", "FoldTrainer", "train_run"]


def train_run(
    run: Run,
    cache: FeatureCache,
    report: Callable[[EpochReport], None],
    runtime: Runtime = Runtime(),
) -> None:
    """Train all folds of a run that are not done, resuming the one that was stopped.

    A fold is done when `Run.is_done` says so. Ctrl-C or SIGTERM ends the running step, saves and
    raises `Stopped`; a kill loses at most the steps since the last save. On one process a resumed
    run ends bit for bit as one that was never stopped. Under torchrun (`distributed.process_group`)
    every process calls this; the first one reads, decides, writes and reports.

    Raises:
        Stopped: The user asked to stop.
        UsageError: The device cannot be used, another process trains the run, or a checkpoint is
            damaged.
    """
    if distributed.rank():
        with stop_flag(ignore_second=True) as stopped:
            _train_folds(run, cache, runtime, None, (stopped, report))
        return
    with (
        stop_flag(ignore_second=distributed.world_size() > 1) as stopped,
        own_log(run.path / "log.jsonl") as log,
    ):
        sweep_partials(run.path)
        _train_folds(run, cache, runtime, log, (stopped, report))
    write_predictions(run.path / "predictions.csv", run.tree, run_predictions(run))


def _train_folds(
    run: Run,
    cache: FeatureCache,
    runtime: Runtime,
    log: TextIO | None,
    ways: tuple[list[int], Callable[[EpochReport], None]],
) -> None:
    for fold in range(len(run.folds)):
        done, _ = distributed.broadcast(run.is_done(fold))
        if not done:
            FoldTrainer(run, fold, cache, runtime, log).train(*ways)
    (signal_number,) = distributed.dist_max(ways[0][:1] or [0])
    if signal_number:  # in the last moments of the last fold
        raise Stopped(signal_number)
