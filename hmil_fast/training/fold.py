"""Train one fold, from its first step to its test predictions."""

import json
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.dropout import drop_features, drop_instances
from hmil_fast.bags.sampler import draw_views, epoch_batches, split_batch
from hmil_fast.config import Runtime
from hmil_fast.device import amp, is_bf16, pick_device
from hmil_fast.errors import Stopped, UsageError
from hmil_fast.evaluation.predict import build_for_run, chunk_rows, fold_predictions, forward
from hmil_fast.files import sweep_partials
from hmil_fast.kernels.gated_attention_pool.chunked import Chunks
from hmil_fast.losses import HmilLoss
from hmil_fast.models.feature_scale import NAME, scaled
from hmil_fast.runs.checkpoint import (
    group_of,
    load_module,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from hmil_fast.runs.predictions import write_predictions
from hmil_fast.runs.run import Run
from hmil_fast.training import distributed
from hmil_fast.training.ema import Ema
from hmil_fast.training.lr_schedule import lr_factor
from hmil_fast.training.standardise import WIDE_RATIO, fit_scale
from hmil_fast.training.validation import leaf_targets, validate

SAVE_EVERY_S = 20.0


@dataclass(frozen=True)
class EpochReport:
    """What a fold reports after each epoch; `last` once more when it ends.

    Attributes:
        model: Name of the model.
        folds: Number of folds.
        epochs: Most epochs of a fold.
        data_share: Share of the training time so far that was spent waiting for features.
        column_ratio: Ratio of the sizes of the features' columns, see `fit_scale`.
    """

    model: str
    folds: int
    epochs: int
    fold: int
    epoch: int
    loss: float
    val_loss: float
    instances_per_s: float
    bags_per_s: float
    best_epoch: int
    data_share: float
    column_ratio: float
    last: bool = False


class FoldTrainer:
    """One fold: its model, optimiser, data and where it stands.

    Args:
        run: The run.
        fold: Its number.
        cache: Features of all slides of the run.
        runtime: Device and precision.
        log: The run's log; None for a process that does not write.

    Attributes:
        epoch: The epoch that is trained, or comes next.
        step: The step of it that comes next.
    """

    def __init__(
        self, run: Run, fold: int, cache: FeatureCache, runtime: Runtime, log: TextIO | None
    ) -> None:
        self.run, self.fold, self.cache, self.log = run, fold, cache, log
        self.device = pick_device(runtime.device, runtime.threads)
        self.precision = run.precision_for(runtime)
        config, self.recipe = run.config, run.config.recipe
        position = {slide_id: i for i, slide_id in enumerate(cache.slide_ids)}
        parts = run.folds[fold]
        self.train_bags = np.array([position[s] for s in parts.train])
        self.val_bags = [position[s] for s in parts.val]
        self.targets = leaf_targets(run, cache)
        torch.manual_seed(config.seed * 1_000 + fold)
        self.model = build_for_run(run)
        scale, self.column_ratio = fit_scale(cache, self.train_bags.tolist())
        if self.column_ratio >= WIDE_RATIO and self.recipe.standardise == "auto":
            self.model.add_module(NAME, scale)
        self.model.to(self.device)
        leaves = self.targets[self.train_bags, -1]
        counts = torch.bincount(leaves, minlength=len(run.tree.leaves))
        if self.recipe.balance == "leaf":  # the sampler balances the leaves already
            counts = counts.clamp_max(1)
        self.loss = HmilLoss(run.tree, self.recipe, counts.tolist()).to(self.device)
        self.average = Ema(self.model, self.recipe.ema)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(),
            lr=self.recipe.lr,
            weight_decay=self.recipe.weight_decay,
            fused=True,
        )
        self.epoch = self.step = 0
        self.best: dict[str, Any] = {"epoch": -1, "val_loss": math.inf}
        self._sums: dict[str, Tensor] = {}  # of the terms over the epoch's steps so far
        self._waited = 0.0
        self._saved = time.monotonic()
        self.path = run.fold_path(fold)
        self._resume(
            *distributed.broadcast(*(self._left() if distributed.rank() == 0 else (None, None)))
        )
        if log is not None:  # nothing changes before all processes have what was left
            self.path.mkdir(exist_ok=True)
            sweep_partials(self.path)
            for stale in (self.path / "predictions.csv", run.val_path(fold)):
                stale.unlink(missing_ok=True)  # of weights that are lost
        self._note(
            "fold",
            step=self.step,
            processes=distributed.world_size(),
            device=str(self.device),
            precision="bf16" if is_bf16(self.device, self.precision) else "fp32",
            columns={"apart": self.column_ratio, "standardised": hasattr(self.model, NAME)},
            cache={"tier": cache.tier.name, "why": cache.tier.why, "bytes": cache.bytes},
        )

    def train(self, stopped: list[int], report: Callable[[EpochReport], None]) -> None:
        """Train to the end, then predict the fold's test slides with the best epoch."""
        recipe = self.recipe
        board = self._board()
        begun = time.perf_counter()
        now = None
        patience = recipe.patience
        while self.epoch < recipe.epochs and self.epoch - 1 - self.best["epoch"] < patience:
            start = time.perf_counter()
            instances, bags = self.train_epoch(stopped)
            seconds = time.perf_counter() - start
            terms = self._means()
            val = validate(
                self.run,
                self.fold,
                self.average.model,
                self.cache,
                self.val_bags,
                self.targets,
                self.precision,
            )
            if self.best["epoch"] < 0 or _score(val) > _score(self.best):
                self.best = {"epoch": self.epoch, **val}
                self._save("best.safetensors")
            waited = self._waited / (time.perf_counter() - begun)
            self._note(
                "epoch",
                loss=terms["total"],
                terms=terms,
                **val,
                seconds=time.perf_counter() - start,
                instances_per_s=instances / seconds,
                bags_per_s=bags / seconds,
                data_share=waited,
            )
            now = EpochReport(
                model=recipe.model,
                folds=len(self.run.folds),
                epochs=recipe.epochs,
                fold=self.fold,
                epoch=self.epoch,
                loss=terms["total"],
                val_loss=val["val_loss"],
                instances_per_s=instances / seconds,
                bags_per_s=bags / seconds,
                best_epoch=self.best["epoch"],
                data_share=waited,
                column_ratio=self.column_ratio,
            )
            if board is not None:
                for name, value in {**terms, **val}.items():
                    board.add_scalar(name, value, self.epoch)
                report(now)
            self.epoch, self.step, self._sums = self.epoch + 1, 0, {}
            self._save_or_stop(stopped)
        if board is None:
            return
        board.close()
        restore(read_checkpoint(self.path / "best.safetensors")[0], self.model)
        test = self.run.folds[self.fold].test
        write_predictions(
            self.path / "predictions.csv",
            self.run.tree,
            fold_predictions(self.run, self.fold, self.model, self.cache, test, self.precision),
            heads=True,
        )
        (self.path / "last.safetensors").unlink(missing_ok=True)
        if now is not None:
            report(replace(now, val_loss=self.best["val_loss"], last=True))

    def train_epoch(self, stopped: list[int]) -> tuple[int, int]:
        """Train the steps of the epoch that are left; how many instances and bags they had."""
        config, recipe = self.run.config, self.recipe
        seed = (config.seed, self.fold, self.epoch)
        lengths = self.cache.lengths[self.train_bags]
        leaves = self.targets[self.train_bags, -1].numpy() if recipe.balance == "leaf" else None
        batches = epoch_batches(lengths, recipe.batch_bags, recipe.batch_instances, seed, leaves)
        views = draw_views(batches, config.views, seed)[self.step :]
        first = self.step
        batches = batches[first:]
        deals = [
            split_batch(lengths[batch], distributed.world_size())[distributed.rank()]
            for batch in batches
        ]
        slides = len(self.cache.slide_ids)
        own = [
            (self.train_bags[batch] + slides * view)[deal].tolist()
            for batch, view, deal in zip(batches, views, deals, strict=True)
        ]
        # one copy an epoch: a step copies nothing but features
        targets = self.targets[
            torch.tensor([i % slides for chosen in own for i in chosen], dtype=torch.int64)
        ]
        targets = targets.to(self.device, non_blocking=True)
        targets_of = torch.split(targets, [len(chosen) for chosen in own])
        self.model.train()
        whole = chunk_rows(self.run, self.model)
        with closing(self.cache.batches(own, self.device, whole)) as features:
            for batch, chosen, y in zip(batches, own, targets_of, strict=True):
                start = time.perf_counter()
                x, bags = next(features)
                self._waited += time.perf_counter() - start
                # a step's randomness is a function of its number: there is no state to keep
                draw = np.random.default_rng((*seed, self.step, distributed.rank()))
                torch.manual_seed(int(draw.integers(2**31)))
                self._set_rate((self.step + 0.5) / (first + len(batches)))
                self.train_step(x, bags, y, len(chosen) / len(batch))
                self.step += 1
                if batch is not batches[-1]:
                    self._save_or_stop(stopped)
        everything = np.concatenate(batches)
        return int(lengths[everything].sum()), len(everything)

    def _set_rate(self, done: float) -> None:
        """Of the optimiser, with this share of the epoch behind it."""
        factor = lr_factor(self.recipe, (self.epoch + done) / self.recipe.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * factor

    def train_step(self, x: Tensor | Chunks, bags: Tensor, targets: Tensor, share: float) -> None:
        """One step; nothing in it makes the host wait for the device.

        Args:
            x: [N, D] on the device, or one large bag in chunks.
            bags: int64 [B, 2] on the CPU, (start, length) of this process's bags.
            targets: int64 [B, L] on the device.
            share: These bags over those of the step.
        """
        x, bags = drop_instances(x, bags, self.recipe.instance_dropout)
        x = drop_features(scaled(self.model, x), self.recipe.feature_dropout)
        with amp(self.device, self.precision):
            output = forward(self.model, x, bags, targets)
        output = distributed.scale_gradients(output, share)
        terms = self.loss(output, bags, targets, self.epoch, self.recipe.epochs)
        self.optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        distributed.average_gradients(self.model.parameters())
        self.optimizer.step()
        self.average.update()
        for name, value in {"total": terms.total.detach(), **terms.terms}.items():
            part = value * share if share else torch.zeros_like(value)  # no bags have no mean
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    def _means(self) -> dict[str, float]:
        """The terms of the epoch, means over its steps."""
        means = {k: float(v) / self.step for k, v in distributed.dist_sum(self._sums).items()}
        if not math.isfinite(means["total"]):
            raise UsageError(
                f"the loss of fold {self.fold} is {means['total']} in epoch {self.epoch}",
                "lower lr, and look for broken features with `hmil-fast store verify`",
            )
        return means

    def _save_or_stop(self, stopped: list[int]) -> None:
        """Save from time to time, and stop if a process was asked to; all do it at one step."""
        due = self.log is not None and time.monotonic() - self._saved > SAVE_EVERY_S
        signal_number, save = distributed.dist_max([stopped[0] if stopped else 0, int(due)])
        if signal_number or save:
            self._save("last.safetensors", resumable=True)
            self._saved = time.monotonic()
        if signal_number:
            raise Stopped(signal_number)

    def _save(self, name: str, *, resumable: bool = False) -> None:
        sums = distributed.dist_sum(self._sums) if resumable else {}
        if self.log is None:
            return
        state = {"epoch": self.epoch, "best": self.best, "settings": self._fingerprint()}
        if not resumable:
            save_checkpoint(self.path / name, self.average.model, state)
            return
        more = {"loss": self.loss.state_dict(), "sums": sums}
        if self.recipe.ema:
            more["average"] = self.average.model.state_dict()
        state |= {"step": self.step, "steps": self.average.steps}
        save_checkpoint(self.path / name, self.model, state, self.optimizer, more)

    def _left(self) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """State and tensors to resume from; no state where the fold starts anew."""
        last = self.path / "last.safetensors"
        if not last.exists():
            return None, {}
        tensors, state = read_checkpoint(last)
        # a checkpoint of version 0.1.0 has no such entry; its folder has been compared already
        if state.get("settings", self._fingerprint()) != self._fingerprint():
            raise UsageError(f"{last} belongs to other settings", "delete that file")
        if state["best"]["epoch"] >= 0 and not (self.path / "best.safetensors").exists():
            return None, {}  # the best weights are lost, and come back from the start only
        return state, tensors

    def _resume(self, state: dict[str, Any] | None, tensors: dict[str, Tensor]) -> None:
        if state is None:
            return
        restore(tensors, self.model, self.optimizer)
        load_module(self.loss, group_of(tensors, "loss"))
        if self.recipe.ema:
            load_module(self.average.model, group_of(tensors, "average"))
        self.average.steps = state["steps"]
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        for name, value in group_of(tensors, "sums").items():
            self._sums[name] = value.to(self.device) * (distributed.rank() == 0)

    def _fingerprint(self) -> str:
        return self.run.config.fingerprint()

    def _board(self) -> Any:
        """TensorBoard's writer, of the process that writes."""
        if self.log is None:
            return None
        from torch.utils.tensorboard import SummaryWriter

        folder = self.run.path / "tensorboard" / f"fold-{self.fold}"
        return SummaryWriter(folder, purge_step=self.epoch)

    def _note(self, event: str, **facts: Any) -> None:
        if self.log is not None:
            where = {"event": event, "fold": self.fold, "epoch": self.epoch}
            self.log.write(json.dumps({**where, **facts}) + "\n")
            self.log.flush()


def _score(val: dict[str, Any]) -> tuple[float, float]:
    """Sort key for the best epoch: balanced accuracy, then lower loss."""
    return val["val_balanced_accuracy"], -val["val_loss"]
