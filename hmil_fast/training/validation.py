"""Score a fold's validation slides, to choose its best epoch."""

import numpy as np
import torch
from torch import Tensor, nn

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.sampler import split_batch
from hmil_fast.evaluation.predict import forward_bags
from hmil_fast.evaluation.prior import trained_shares
from hmil_fast.metrics import all_levels, decide, flat_metrics, leaf_probabilities
from hmil_fast.runs.run import Run
from hmil_fast.training import distributed


def leaf_targets(run: Run, cache: FeatureCache) -> Tensor:
    """The node of every cached slide on every level, int64 [B, L]."""
    label = {slide.slide_id: run.tree.leaf(slide.label) for slide in run.slides}
    nodes = run.tree.ancestors()
    leaves = np.array([label[slide_id] for slide_id in cache.slide_ids], dtype=np.int64)
    return torch.from_numpy(np.ascontiguousarray(nodes[:, leaves].T))


def validate(
    run: Run,
    fold: int,
    model: nn.Module,
    cache: FeatureCache,
    bags: list[int],
    targets: Tensor,
    precision: str,
) -> dict[str, float]:
    """Loss and balanced accuracy of the leaves, and the AUC as mean over the levels.

    Answers are those of `predict`. Every process predicts a share of the slides and scores all.

    Args:
        run: The run.
        fold: Which fold is trained.
        model: The model as it is now.
        cache: Features.
        bags: The validation slides' places in the cache.
        targets: int64 [B, L] for all slides of the cache.
        precision: Of matrix products, as `Runtime` has it.
    """
    own = split_batch(cache.lengths[bags], distributed.world_size())[distributed.rank()]
    place = {index: i for i, index in enumerate(bags)}
    sizes = list(run.tree.num_classes)
    chosen: list[int] = []
    found = [np.zeros((0, sum(sizes)))]
    for part, output, _ in forward_bags(run, model, cache, [bags[i] for i in own], precision):
        chosen += [place[index] for index in part]
        found.append(torch.cat([level.double() for level in output.logits], 1).cpu().numpy())
    rows = distributed.dist_rows(np.concatenate(found), chosen, len(bags))
    logits = torch.split(torch.from_numpy(rows).float(), sizes, 1)
    y = targets[bags]
    loss = nn.functional.cross_entropy(logits[-1], y[:, -1], reduction="none")
    heads = [level.double().softmax(1).numpy() for level in logits]
    p_leaf = leaf_probabilities(run.tree, heads, trained_shares(run, fold), heads=not run.sums)
    answers = torch.from_numpy(decide(run.tree, p_leaf).nodes[-1])
    right = (answers == y[:, -1]).float()
    levels = all_levels(run.tree, p_leaf)
    flat = [flat_metrics(y[:, l].numpy(), level) for l, level in enumerate(levels)]
    return {
        "val_loss": _mean_per_class(loss, y[:, -1]),
        "val_balanced_accuracy": _mean_per_class(right, y[:, -1]),
        "val_auc": float(np.mean([metrics.get("auc", 0.5) for metrics in flat])),
    }


def _mean_per_class(values: Tensor, y: Tensor) -> float:
    return float(torch.stack([values[y == k].mean() for k in set(y.tolist())]).mean())
