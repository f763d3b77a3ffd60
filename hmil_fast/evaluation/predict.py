"""Predict slides with the folds of a trained run."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.sampler import epoch_batches
from hmil_fast.config import Runtime
from hmil_fast.device import amp, pick_device
from hmil_fast.errors import UsageError
from hmil_fast.evaluation.prior import Prior, current_prior, trained_shares, under_prior
from hmil_fast.kernels.gated_attention_pool.chunked import Chunks
from hmil_fast.metrics import all_levels, leaf_probabilities
from hmil_fast.models import build_model
from hmil_fast.models.feature_scale import NAME, FeatureScale, scaled
from hmil_fast.models.output import HmilOutput
from hmil_fast.runs.checkpoint import read_checkpoint, restore
from hmil_fast.runs.predictions import Prediction, write_predictions
from hmil_fast.runs.run import Run

if TYPE_CHECKING:
    from hmil_fast.models.hmil import HMIL


def build_for_run(run: Run) -> nn.Module:
    """The untrained model of a run's settings."""
    recipe, tree = run.config.recipe, run.tree
    return build_model(
        recipe.model,
        run.store["dim"],
        tree.num_classes,
        tree.parents,
        hidden=recipe.hidden,
        dropout=recipe.dropout,
        readout=recipe.readout,
    )


def load_fold(run: Run, fold: int, device: torch.device) -> nn.Module:
    """The best model of one fold, ready to predict.

    Raises:
        UsageError: The fold is not trained yet, or its checkpoint is damaged.
    """
    if not run.is_done(fold):
        raise UsageError(
            f"fold {fold} of {run.path} is not trained to its end",
            "run `hmil-fast train` with the same --out again, it resumes",
        )
    model = build_for_run(run)
    tensors = read_checkpoint(run.fold_path(fold) / "best.safetensors")[0]
    if f"model.{NAME}.mean" in tensors:
        model.add_module(NAME, FeatureScale(run.store["dim"]))
    restore(tensors, model.to(device))
    return model.eval()


def chunk_rows(run: Run, model: nn.Module) -> int | None:
    """Rows of the chunks that a bag larger than a batch goes in; None if the model takes none."""
    return run.config.recipe.batch_instances if hasattr(model, "forward_chunks") else None


def forward(
    model: nn.Module, x: Tensor | Chunks, bags: Tensor, targets: Tensor | None = None
) -> HmilOutput:
    """The model's output for a batch, or for one bag in chunks; x has gone through `scaled`."""
    if isinstance(x, Tensor):
        output: HmilOutput = model(x, bags, targets=targets)
        return output
    return cast("HMIL", model).forward_chunks(x)


@torch.inference_mode()
def forward_bags(
    run: Run, model: nn.Module, cache: FeatureCache, indices: Sequence[int], precision: str
) -> Iterator[tuple[list[int], HmilOutput, Tensor]]:
    """Run a model over bags of the cache, batch by batch.

    Yields:
        Positions in the cache, the model's output for them, and the bags int64 [B, 2].
    """
    device = next(model.parameters()).device
    model.eval()
    lengths = cache.lengths[list(indices)]
    budget = (run.config.recipe.batch_bags, run.config.recipe.batch_instances)
    batches = [[indices[i] for i in batch] for batch in epoch_batches(lengths, *budget, seed=None)]
    features = cache.batches(batches, device, chunk_rows(run, model))
    for chosen, (x, bags) in zip(batches, features, strict=True):
        with amp(device, precision):
            output = forward(model, scaled(model, x), bags)
        yield chosen, output, bags


def fold_predictions(
    run: Run,
    fold: int,
    model: nn.Module,
    cache: FeatureCache,
    slide_ids: Sequence[str],
    precision: str,
) -> list[Prediction]:
    """One fold's predictions for slides of the cache, in order, under the balanced prior."""
    position = {slide_id: i for i, slide_id in enumerate(cache.slide_ids)}
    predictions = []
    indices = [position[s] for s in slide_ids]
    for chosen, output, _ in forward_bags(run, model, cache, indices, precision):
        predictions += _predictions(run, fold, cache, chosen, output)
    return predictions


def _predictions(
    run: Run, fold: int, cache: FeatureCache, chosen: Sequence[int], output: HmilOutput
) -> list[Prediction]:
    """Predictions of one forward for the bags `chosen`, under the balanced prior."""
    known = {slide.slide_id: slide for slide in run.slides}
    heads = [level.double().softmax(1).cpu().numpy() for level in output.logits]
    p_leaf = leaf_probabilities(run.tree, heads, trained_shares(run, fold), heads=not run.sums)
    levels = all_levels(run.tree, p_leaf)
    predictions = []
    for row, index in enumerate(chosen):
        slide_id = cache.slide_ids[index]
        slide = known.get(slide_id)
        predictions.append(
            Prediction(
                slide_id,
                slide.patient_id if slide else slide_id,
                fold,
                slide.label if slide else "",
                int(cache.lengths[index]),
                tuple(level[row] for level in levels),
                tuple(level[row] for level in heads[:-1]),
            )
        )
    return predictions


def write_validation(run: Run, cache: FeatureCache, runtime: Runtime = Runtime()) -> None:
    """Predict every fold's validation slides with its best weights, where that is not done."""
    device, precision = pick_device(runtime.device, runtime.threads), run.precision_for(runtime)
    for fold, parts in enumerate(run.folds):
        if not run.val_path(fold).exists():
            model = load_fold(run, fold, device)
            predictions = fold_predictions(run, fold, model, cache, parts.val, precision)
            write_predictions(run.val_path(fold), run.tree, predictions, heads=True)


def predict_slides(
    run: Run, cache: FeatureCache, prior: Prior | None = None, runtime: Runtime = Runtime()
) -> list[Prediction]:
    """Predictions of a run for every slide of the cache.

    A slide that the run was made with is predicted by the fold that tested it, or the mean of such
    folds; for any other slide the probabilities of all folds are averaged.

    Args:
        run: A run that is trained to its end.
        cache: The slides' features.
        prior: How frequent the leaves are; by default as in the run's last evaluation.
        runtime: Device and precision.
    """
    device, precision = pick_device(runtime.device, runtime.threads), run.precision_for(runtime)
    tested = {slide_id for fold in run.folds for slide_id in fold.test}
    new = [slide_id for slide_id in cache.slide_ids if slide_id not in tested]
    of_slide: dict[str, list[Prediction]] = {slide_id: [] for slide_id in cache.slide_ids}
    for fold, parts in enumerate(run.folds):
        tests = set(parts.test)
        own = [slide_id for slide_id in cache.slide_ids if slide_id in tests]
        model = load_fold(run, fold, device)
        for prediction in fold_predictions(run, fold, model, cache, [*own, *new], precision):
            of_slide[prediction.slide_id].append(prediction)
    means = [_mean(predictions) for predictions in of_slide.values()]
    return under_prior(run.tree, means, prior or current_prior(run))


def slide_attention(
    run: Run, cache: FeatureCache, slide_id: str, runtime: Runtime = Runtime()
) -> tuple[Prediction, list[NDArray[np.float64]]]:
    """A slide's prediction and the attention of that very forward.

    Returns:
        The prediction under the prior of the run's last evaluation, and per level the attention
        float64 [n, C_l] that the model's output holds, summing to 1 over the tiles of the bag; no
        entry for a model without attention. For a slide that is new to the run both are means over
        the folds.
    """
    device, precision = pick_device(runtime.device, runtime.threads), run.precision_for(runtime)
    tested_in = [i for i, fold in enumerate(run.folds) if slide_id in fold.test]
    index = cache.slide_ids.index(slide_id)
    predictions, maps = [], []
    for fold in tested_in or range(len(run.folds)):
        model = load_fold(run, fold, device)
        chosen, output, _ = next(forward_bags(run, model, cache, [index], precision))
        predictions += _predictions(run, fold, cache, chosen, output)
        maps.append(
            [
                (scores.double() - lse.double()).exp().cpu().numpy()
                for scores, lse in zip(output.attention_logits, output.lse, strict=True)
            ]
        )
    (prediction,) = under_prior(run.tree, [_mean(predictions)], current_prior(run))
    return prediction, [np.mean(level, axis=0) for level in zip(*maps, strict=True)]


def _mean(predictions: list[Prediction]) -> Prediction:
    first = predictions[0]
    if len(predictions) == 1:
        return first
    levels, heads = (
        tuple(np.mean(level, axis=0) for level in zip(*several, strict=True))
        for several in ((p.probabilities for p in predictions), (p.heads for p in predictions))
    )
    return replace(first, fold=-1, probabilities=levels, heads=heads)
