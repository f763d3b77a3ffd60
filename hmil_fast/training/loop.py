"""Training: every fold from first epoch to test predictions, top to bottom."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from hmil_fast.bags.packed import FeatureCache, epoch_batches
from hmil_fast.device import amp, pick_device
from hmil_fast.errors import Stopped, UsageError
from hmil_fast.losses import HmilLoss
from hmil_fast.metrics import flat_metrics
from hmil_fast.training.checkpoint import read_checkpoint, restore, save_checkpoint
from hmil_fast.training.predict import build_for_run, fold_predictions, forward_bags
from hmil_fast.training.run_folder import Run, read_predictions, write_predictions

SAVE_EVERY_S = 20.0


@dataclass(frozen=True)
class EpochReport:
    """What a fold reports after each epoch; `last` once more when it ends.

    Attributes:
        data_share: Share of the training time so far that was spent waiting for features.
    """

    fold: int
    epoch: int
    loss: float
    val_loss: float
    instances_per_s: float
    best_epoch: int
    data_share: float
    last: bool = False


def train_run(run: Run, cache: FeatureCache, report: Callable[[EpochReport], None]) -> None:
    """Train all folds of a run that are not done, resuming the one that was stopped.

    A fold is done when `Run.is_done` says so. Ctrl-C or SIGTERM ends the running epoch, saves
    and raises `Stopped`; a kill loses at most the epochs since the last save.

    Raises:
        Stopped: The user asked to stop.
        UsageError: The device cannot be used, or a checkpoint is damaged.
    """
    device = pick_device(run.config.device)
    with _stop_flag() as stopped, (run.path / "log.jsonl").open("a", encoding="utf-8") as log:
        for fold in range(len(run.folds)):
            if not run.is_done(fold):
                FoldTrainer(run, fold, cache, device, log).train(stopped, report)
        if stopped:  # in the last moments of the last fold
            raise Stopped(stopped[0])
    everything = [
        prediction
        for fold in range(len(run.folds))
        for prediction in read_predictions(run.fold_path(fold) / "predictions.csv", run.tree)
    ]
    write_predictions(run.path / "predictions.csv", run.tree, everything)


class FoldTrainer:
    """One fold: its model, optimiser, data and where it stands."""

    def __init__(
        self, run: Run, fold: int, cache: FeatureCache, device: torch.device, log: TextIO
    ) -> None:
        self.run, self.fold, self.cache, self.device, self.log = run, fold, cache, device, log
        config = run.config
        position = {slide_id: i for i, slide_id in enumerate(cache.slide_ids)}
        parts = run.folds[fold]
        self.train_bags = [position[s] for s in parts.train]
        self.val_bags = [position[s] for s in parts.val]
        self.targets = leaf_targets(run, cache)
        torch.manual_seed(config.seed * 1_000 + fold)
        self.model = build_for_run(run).to(device)
        self.loss = HmilLoss(run.tree, config.preset).to(device)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        self.epoch = 0
        self.best: dict[str, Any] = {"epoch": -1, "val_auc": -1.0, "val_loss": math.inf}
        self._waited = 0.0
        self.path = run.fold_path(fold)
        self.path.mkdir(exist_ok=True)
        (self.path / "predictions.csv").unlink(missing_ok=True)  # of weights that are lost
        names = ("last.safetensors", "best.safetensors")
        if all((self.path / name).exists() for name in names):
            self._resume()

    def train(self, stopped: list[int], report: Callable[[EpochReport], None]) -> None:
        """Train to the end, then predict the fold's test slides with the best epoch."""
        from torch.utils.tensorboard import SummaryWriter

        config = self.run.config
        folder = self.run.path / "tensorboard" / f"fold-{self.fold}"
        board = SummaryWriter(folder, purge_step=self.epoch)
        begun = time.perf_counter()
        saved = time.monotonic()
        now = None
        while self.epoch < config.epochs and self.epoch - 1 - self.best["epoch"] < config.patience:
            start = time.perf_counter()
            terms, instances = self._train_epoch()
            val = self._validate()
            seconds = time.perf_counter() - start
            # ranks first: with few validation slides the loss mostly tells how sure the model is
            if (val["val_auc"], -val["val_loss"]) > (self.best["val_auc"], -self.best["val_loss"]):
                self.best = {"epoch": self.epoch, **val}
                self._save("best.safetensors")
            record = {
                "event": "epoch",
                "fold": self.fold,
                "epoch": self.epoch,
                "loss": terms["total"],
                "terms": terms,
                **val,
                "seconds": seconds,
                "instances_per_s": instances / seconds,
            }
            self.log.write(json.dumps(record) + "\n")
            self.log.flush()
            for name, value in {**terms, **val}.items():
                board.add_scalar(name, value, self.epoch)
            now = EpochReport(
                self.fold,
                self.epoch,
                terms["total"],
                val["val_loss"],
                instances / seconds,
                self.best["epoch"],
                self._waited / (time.perf_counter() - begun),
            )
            report(now)
            self.epoch += 1
            if stopped:
                self._save("last.safetensors", self.optimizer)
                raise Stopped(stopped[0])
            if time.monotonic() - saved > SAVE_EVERY_S:
                self._save("last.safetensors", self.optimizer)
                saved = time.monotonic()
        board.close()
        restore(read_checkpoint(self.path / "best.safetensors")[0], self.model)
        write_predictions(
            self.path / "predictions.csv",
            self.run.tree,
            fold_predictions(
                self.run, self.fold, self.model, self.cache, self.run.folds[self.fold].test
            ),
        )
        (self.path / "last.safetensors").unlink(missing_ok=True)
        if now is not None:
            report(replace(now, val_loss=self.best["val_loss"], last=True))

    def _train_epoch(self) -> tuple[dict[str, float], int]:
        config = self.run.config
        seed = (config.seed, self.fold, self.epoch)
        torch.manual_seed(int(np.random.default_rng(seed).integers(2**31)))  # same after a resume
        self.model.train()
        lengths = self.cache.lengths[self.train_bags]
        batches = epoch_batches(lengths, config.batch_bags, config.batch_instances, seed)
        totals: dict[str, Tensor] = {}
        for batch in batches:
            indices = [self.train_bags[i] for i in batch]
            start = time.perf_counter()
            x, bags = self.cache.batch(indices, self.device)
            self._waited += time.perf_counter() - start
            targets = self.targets[indices].to(self.device, non_blocking=True)
            with amp(self.device):
                output = self.model(x, bags)
            terms = self.loss(output, bags, targets, self.epoch, config.epochs)
            self.optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            self.optimizer.step()
            for name, value in {"total": terms.total.detach(), **terms.terms}.items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + value
        means = {name: float(value) / len(batches) for name, value in totals.items()}
        if not math.isfinite(means["total"]):
            raise UsageError(
                f"the loss of fold {self.fold} is {means['total']} in epoch {self.epoch}",
                "lower lr, and look for broken features with `hmil-fast store verify`",
            )
        return means, int(lengths.sum())

    def _validate(self) -> dict[str, float]:
        """Scores of the validation slides: loss of the leaves, AUC as mean over the levels."""
        chosen: list[int] = []
        parts: list[list[Tensor]] = []
        for part, output, _ in forward_bags(self.run, self.model, self.cache, self.val_bags):
            chosen += part
            parts.append([level.float().cpu() for level in output.logits])
        logits = [torch.cat(level) for level in zip(*parts, strict=True)]
        y = self.targets[chosen]
        loss = nn.functional.cross_entropy(logits[-1], y[:, -1], reduction="none")
        right = (logits[-1].argmax(1) == y[:, -1]).float()
        flat = [
            flat_metrics(y[:, l].numpy(), level.softmax(1).double().numpy())
            for l, level in enumerate(logits)
        ]
        return {
            "val_loss": _mean_per_class(loss, y[:, -1]),
            "val_balanced_accuracy": _mean_per_class(right, y[:, -1]),
            "val_auc": float(np.mean([metrics.get("auc", 0.5) for metrics in flat])),
        }

    def _save(self, name: str, optimizer: torch.optim.Adam | None = None) -> None:
        state = {"epoch": self.epoch, "best": self.best, "fingerprint": self._fingerprint()}
        save_checkpoint(self.path / name, self.model, state, optimizer)

    def _resume(self) -> None:
        tensors, state = read_checkpoint(self.path / "last.safetensors")
        if state["fingerprint"] != self._fingerprint():
            raise UsageError(
                f"{self.path}/last.safetensors belongs to other settings", "delete that file"
            )
        restore(tensors, self.model, self.optimizer)
        self.epoch, self.best = state["epoch"], state["best"]

    def _fingerprint(self) -> str:
        return self.run.config.fingerprint()


def leaf_targets(run: Run, cache: FeatureCache) -> Tensor:
    """The node of every cached slide on every level, int64 [B, L]."""
    label = {slide.slide_id: run.tree.leaf(slide.label) for slide in run.slides}
    nodes = run.tree.ancestors()
    leaves = np.array([label[slide_id] for slide_id in cache.slide_ids], dtype=np.int64)
    return torch.from_numpy(np.ascontiguousarray(nodes[:, leaves].T))


def _mean_per_class(values: Tensor, y: Tensor) -> float:
    return float(torch.stack([values[y == k].mean() for k in set(y.tolist())]).mean())


@contextmanager
def _stop_flag() -> Iterator[list[int]]:
    """A list that fills with the signals Ctrl-C and SIGTERM; the second one stops at once."""
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stopped:
            raise Stopped(number)
        stopped.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
