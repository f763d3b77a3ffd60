"""Train one method on one cohort, with the library's own models and losses."""

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.accuracy.cohorts import Cohort
from bench.accuracy.methods import STRENGTHS, YARDSTICK, Method
from bench.accuracy.sources import Floats, Ints
from bench.accuracy.tiles import tile_aucs
from hmil_fast.metrics import decide, flat_metrics, leaf_probabilities, training_shares

Probabilities = NDArray[np.float64]


class Fitted(NamedTuple):
    """What the models of one method say of the tested bags.

    Attributes:
        p: Leaf probabilities [B, leaves]; NaN for bags that are not tested.
        tiles: `tile_aucs`, where the cohort knows its tumour tiles and has one fold.
    """

    p: Probabilities
    tiles: dict[str, float]


def fit(method: Method, cohort: Cohort, epochs: int, val_fraction: float, seed: int) -> Fitted:
    """Predict every tested bag by a model that did not see it.

    All training bags train, to the last epoch, but for methods as they were published: with these,
    a part of the training bags chooses the epoch, by the balanced accuracy of the leaves, then by
    their loss, mean over the classes.
    """
    found = np.full((len(cohort.y), cohort.tree.num_classes[-1]), np.nan)
    tiles: dict[str, float] = {}
    for fold, test in enumerate(cohort.tests):
        rest = np.setdiff1d(np.arange(len(cohort.y)), test)
        if method.model == YARDSTICK:
            found[test] = _pooled_regression(cohort, rest, test)
        else:
            train, val = _cut(rest, cohort.y, val_fraction * method.published, seed)
            trainer = _Trainer(method, cohort, epochs, train, seed * 1000 + fold)
            found[test] = trainer.fit(val, test)
            if cohort.tumour is not None and len(cohort.tests) == 1:
                tiles = trainer.tile_aucs(test, found[test])
    return Fitted(found, tiles)


def _cut(rest: Ints, y: Ints, fraction: float, seed: int) -> tuple[Ints, Ints]:
    from sklearn.model_selection import train_test_split

    if not fraction:
        return rest, rest[:0]
    train, val = train_test_split(rest, test_size=fraction, stratify=y[rest], random_state=seed)
    return train, val


def _pooled_regression(cohort: Cohort, train: Ints, test: Ints) -> Probabilities:
    """Logistic regression on the mean, largest and smallest value of every feature."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    bags = [cohort.x[start : start + length] for start, length in cohort.bags]
    pooled = np.stack([np.concatenate([b.mean(0), b.max(0), b.min(0)]) for b in bags])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(pooled[train], cohort.y[train])
    return np.asarray(model.predict_proba(pooled[test]), dtype=np.float64)


def _standardised(cohort: Cohort, train: Ints) -> Floats:
    """Features with mean 0 and deviation 1 over the instances of the training bags."""
    spans = cohort.bags[train]
    seen = np.concatenate([cohort.x[start : start + length] for start, length in spans])
    deviation = seen.std(0, dtype=np.float64)
    scale = np.where(deviation > 0, deviation, 1)
    return ((cohort.x - seen.mean(0, dtype=np.float64)) / scale).astype(np.float32)


class _Trainer:
    """One model on one split."""

    def __init__(self, method: Method, cohort: Cohort, epochs: int, train: Ints, seed: int) -> None:
        import torch

        from hmil_fast.losses import HmilLoss
        from hmil_fast.models import build_model
        from hmil_fast.training.ema import Ema

        torch.manual_seed(seed)
        self.method, self.cohort, self.epochs, self.seed = method, cohort, epochs, seed
        self.train, self.strength = train, STRENGTHS[method.strength]
        x = _standardised(cohort, train) if cohort.mixed_units else cohort.x
        self.x = torch.from_numpy(x)
        self.targets = torch.from_numpy(
            np.ascontiguousarray(cohort.tree.ancestors()[:, cohort.y].T)
        )
        self.model = build_model(
            method.model,
            cohort.x.shape[1],
            cohort.tree.num_classes,
            cohort.tree.parents,
            hidden=method.hidden,
            readout=method.loss.readout,
        )
        self.loss = HmilLoss(
            cohort.tree,
            method.loss,
            np.bincount(cohort.y[train], minlength=len(cohort.tree.leaves)).tolist(),
        )
        self.average = Ema(self.model, method.loss.ema)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=method.lr, weight_decay=self.strength.weight_decay
        )

    def fit(self, val: Ints, test: Ints) -> Probabilities:
        """Leaf probabilities of the test bags at the epoch that is best on the validation bags."""
        best, state = (-1.0, -math.inf), self._state()
        for epoch in range(self.epochs):
            self._train_epoch(epoch)
            if len(val) and (score := self._score(val)) > best:
                best, state = score, self._state()
        if len(val):
            self.average.model.load_state_dict(state)
        return self._predict(test)

    def _state(self) -> dict[str, Any]:
        return {name: value.clone() for name, value in self.average.model.state_dict().items()}

    def _train_epoch(self, epoch: int) -> None:
        import torch

        from hmil_fast.bags.dropout import drop_instances
        from hmil_fast.training.lr_schedule import lr_factor

        self.model.train()
        order = np.random.default_rng((self.seed, epoch)).permutation(self.train)
        for i in range(0, len(order), self.method.batch_bags):
            chosen = order[i : i + self.method.batch_bags]
            done = (epoch + min(1, (i + self.method.batch_bags / 2) / len(order))) / self.epochs
            for group in self.optimizer.param_groups:
                group["lr"] = self.method.lr * lr_factor(self.method.loss, done)
            x, bags = drop_instances(*self._pack(chosen), self.strength.instance_dropout)
            x = torch.nn.functional.dropout(x, self.strength.feature_dropout)
            targets = self.targets[chosen]
            output = self.model(x, bags, targets)
            terms = self.loss(output, bags, targets, epoch, self.epochs)
            self.optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            self.optimizer.step()
            self.average.update()

    def _pack(self, chosen: Ints) -> tuple[Any, Any]:
        import torch

        spans = self.cohort.bags[chosen]
        x = torch.cat([self.x[start : start + length] for start, length in spans])
        ends = np.cumsum(spans[:, 1])
        return x, torch.from_numpy(np.stack([ends - spans[:, 1], spans[:, 1]], axis=1))

    def _predict(self, chosen: Ints) -> Probabilities:
        """Leaf probabilities under the balanced prior, as `hmil-fast predict` gives them."""
        import torch

        model, tree = self.average.model.eval(), self.cohort.tree
        with torch.inference_mode():
            logits = model(*self._pack(chosen)).logits
        levels = [level.double().softmax(1).numpy() for level in logits]
        counts = np.bincount(self.cohort.y[self.train], minlength=len(tree.leaves))
        balanced = self.method.loss.class_weights == "balanced"
        shares = training_shares(tree, counts.tolist(), balanced_loss=balanced)
        return leaf_probabilities(tree, levels, shares, heads=self.method.loss.coarse == "head")

    def tile_aucs(self, chosen: Ints, p: Probabilities) -> dict[str, float]:
        """`tile_aucs` of bags whose leaf probabilities are p."""
        import torch

        assert self.cohort.tumour is not None
        x, bags = self._pack(chosen)
        with torch.inference_mode():
            output = self.average.model.eval()(x, bags)
        lengths = bags[:, 1]
        attention = [
            (scores.double() - lse.double().repeat_interleave(lengths, 0)).exp().numpy()
            for scores, lse in zip(output.attention_logits, output.lse, strict=True)
        ]
        spans = self.cohort.bags[chosen]
        tumour = np.concatenate([self.cohort.tumour[a : a + n] for a, n in spans])
        sums = self.method.loss.coarse == "sum"
        return tile_aucs(self.cohort.tree, attention, bags.numpy(), tumour, p, sums=sums)

    def _score(self, val: Ints) -> tuple[float, float]:
        p, y = self._predict(val), self.cohort.y[val]
        answers = decide(self.cohort.tree, p).nodes[-1]
        nll = -np.log(np.maximum(p[np.arange(len(y)), y], 1e-12))
        loss = float(np.mean([nll[y == k].mean() for k in set(y.tolist())]))
        return flat_metrics(y, p, answers)["balanced_accuracy"], -loss
