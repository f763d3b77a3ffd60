"""The progress bar of `hmil-fast train`: epochs over all folds, a line for each fold."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn

from hmil_fast.cli.console import Bar

if TYPE_CHECKING:
    from hmil_fast.training.fold import EpochReport


class TrainingBar(Bar):
    """A bar per model; a fold that stops early counts with all of its epochs.

    Args:
        console: Where to draw.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(
            console, TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn()
        )
        self._task: TaskID | None = None
        self._model = ""

    def update(self, event: "EpochReport | str") -> None:
        """Print a note, or show the end of an epoch or of a fold."""
        if isinstance(event, str):
            self.note(event)
            return
        if self._task is None or event.model != self._model:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._model = event.model
            self._task = self._bar.add_task(self._model, total=event.epochs * event.folds)
        fold = f"{event.model} fold {event.fold} of 0–{event.folds - 1}"
        completed = event.fold * event.epochs + event.epoch + 1
        if event.last:
            completed = (event.fold + 1) * event.epochs
            self.console.print(
                f"[green]✓[/] {fold}: best epoch {event.best_epoch + 1} of {event.epoch + 1}, "
                f"validation loss {event.val_loss:.3f}, {event.instances_per_s:,.0f} "
                f"instances/s, {event.bags_per_s:,.1f} bags/s, waited for data "
                f"{event.data_share:.1%} of the time"
            )
        text = f"{fold} epoch {event.epoch + 1} loss {event.loss:.3f}"
        self._bar.update(self._task, completed=completed, description=text)
