"""Measure training steps of HMIL in four ways on the same bags, losses and optimiser.

packed    as `hmil-fast train` does: batches packed, folded forward, one backward
loop      one bag at a time, the published formulas, one forward; the clean loop
padded    bags padded to the longest, with a mask
released  one bag at a time, in the authors' pattern of calls: each level from the features on, and
          all of it again for the attention; the first two layers three times, the others twice

All with the losses of the preset `released`, whose alignment of instances needs no gradient. On a
GPU 64 bags a step; on a CPU fewer, so that it ends in minutes.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.dropout import drop_features, drop_instances
from hmil_fast.device import amp, pick_device
from hmil_fast.io.store import StoreSpec, create_store
from hmil_fast.labels import LabelTree
from hmil_fast.losses import HmilLoss
from hmil_fast.models.hmil import HMIL
from hmil_fast.models.output import HmilOutput
from hmil_fast.recipe import PRESETS

_TREE = LabelTree.from_nested(
    {"benign": ["N", "PB", "UDH"], "atypical": ["FEA", "ADH"], "malignant": ["DCIS", "IC"]}
)
_DIM = 1024
_BAGS_ON_CPU = {500: 32, 5_000: 8, 50_000: 1}
_MOST_STEPS = 1000
_FORMS = ("packed", "loop", "padded", "released")


def make_cache(path: Path, bags: int, mean: int, tier: str, device: torch.device) -> FeatureCache:
    """Random features in a real store; lognormal lengths with this mean, as in cohorts."""
    rng = np.random.default_rng(0)
    spread = rng.lognormal(0, 0.5, bags)
    lengths = np.maximum(spread / spread.mean() * mean, 1).astype(int)
    store = create_store(path / "store", StoreSpec(_DIM, "float16", {"name": "noise"}, {}))
    for k, n in enumerate(lengths.tolist()):
        with store.writer(f"s{k}", n, {}) as writer:
            writer.append(rng.standard_normal((n, _DIM), np.float32).astype(np.float16))
            writer.commit(np.zeros((n, 2), np.int64), np.zeros(n, np.uint8), {})
    return FeatureCache(store, [f"s{k}" for k in range(bags)], path, tier, device)


def padded_forward(model: HMIL, bags: list[Tensor]) -> tuple[HmilOutput, Tensor]:
    """The published formulas on [B, longest, D] with a mask; attention of padding is 0."""
    lengths = torch.tensor([len(x) for x in bags])
    x = torch.nn.utils.rnn.pad_sequence(bags, batch_first=True)
    mask = (torch.arange(x.shape[1]) < lengths[:, None]).to(x.device)[:, :, None]
    h = F.relu(model.reduce(x.to(model.reduce.weight.dtype)))
    means, scores, lse = [], [], []
    for level in model._levels():
        h = level.embed(h)
        s = level.w(torch.tanh(level.V(h)) * torch.sigmoid(level.U(h))).float()
        s = s.masked_fill(~mask, -torch.inf)
        scores.append(s[mask.squeeze(2)])
        lse.append(torch.logsumexp(s, 1))
        means.append(torch.softmax(s, 1).mT @ h.float())
    starts = lengths.cumsum(0) - lengths
    output = model._output(means, tuple(scores), tuple(lse))
    return output, torch.stack([starts, lengths], 1)


def released_forward(model: HMIL, x: Tensor, bags: Tensor) -> HmilOutput:
    """The published formulas, one bag at a time, each branch from the features on."""
    means: list[list[Tensor]] = [[] for _ in model.levels]
    scores: list[list[Tensor]] = [[] for _ in model.levels]

    def embeddings(rows: Tensor, levels: int) -> list[Tensor]:
        h, found = F.relu(model.reduce(rows.to(model.reduce.weight.dtype))), []
        for level in model._levels()[:levels]:
            h = level.embed(h)
            found.append(h)
        return found

    def attention(l: int, h: Tensor) -> Tensor:
        level = model._levels()[l]
        return level.w(torch.tanh(level.V(h)) * torch.sigmoid(level.U(h))).float()

    for start, length in bags.tolist():
        rows = x[start : start + length]
        for l in range(len(means)):
            h = embeddings(rows, l + 1)[l]
            means[l].append(torch.softmax(attention(l, h), 0).T @ h.float())
        for l, h in enumerate(embeddings(rows, len(means))):
            scores[l].append(attention(l, h))
    lse = tuple(torch.stack([torch.logsumexp(s, 0) for s in level]) for level in scores)
    output = model._output([torch.stack(level) for level in means], (), lse)
    return output._replace(attention_logits=tuple(torch.cat(level) for level in scores))


def make_step(
    form: str, cache: FeatureCache, precision: str, device: torch.device
) -> Callable[[], Tensor]:
    """One optimiser step over all bags of the cache; returns the loss."""
    torch.manual_seed(0)
    model = HMIL(_DIM, _TREE.num_classes).to(device)
    loss = HmilLoss(_TREE, "released").to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    count = len(cache.slide_ids)
    targets = torch.from_numpy(_TREE.ancestors()).T[torch.arange(count) % 7].to(device)
    # an order in which few bags are neighbours, as after a shuffle
    order = np.random.default_rng(1).permutation(count).tolist()
    # as the training loop asks for them: into memory that the batch before has left
    features = cache.batches([order] * _MOST_STEPS, device)

    def forward() -> tuple[HmilOutput, Tensor]:
        if form == "padded":
            return padded_forward(model, [cache.batch([i], device)[0] for i in order])
        x, bags = next(features)
        if form == "packed":
            return model(x, bags), bags
        if form == "released":
            return released_forward(model, x, bags), bags
        return model.forward_unfolded(x, bags), bags

    def step() -> Tensor:
        with amp(device, precision):
            output, bags = forward()
        terms = loss(output, bags, targets, 50, 200)
        optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return terms.total.detach()

    return step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mean", [500, 5_000, 50_000])
def test_train_step(benchmark: BenchmarkFixture, tmp_path: Path, mean: int, precision: str) -> None:
    """Turn by turn, so that a busy machine is as hard on the one as on the others."""
    device = pick_device("auto")
    bags = _BAGS_ON_CPU[mean] if device.type == "cpu" else 64
    cache = make_cache(tmp_path, bags, mean, "device", device)
    # on a CPU its time says more than the wall's, which others may take
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {form: [] for form in _FORMS}
    steps = {form: make_step(form, cache, precision, device) for form in _FORMS}
    losses = {form: float(step()) for form, step in steps.items()}
    for one, other in pairwise(losses.values()):  # the same function
        assert one == pytest.approx(other, rel=1e-3 if precision == "fp32" else 0.05)

    def timed(*forms: str) -> None:
        for form in forms:
            start = clock()
            steps[form]()
            seconds[form].append(clock() - start)

    rounds = 2 if device.type == "cpu" else 10
    benchmark.pedantic(timed, ("packed",), setup=lambda: timed(*_FORMS[1:]), rounds=rounds)
    instances = int(cache.lengths.sum())
    medians = {form: median(values) for form, values in seconds.items()}
    ratios = {form: value / medians["packed"] for form, value in medians.items()}
    speed = {
        "instances_per_s": instances / medians["packed"],
        "bags_per_s": bags / medians["packed"],
    }
    benchmark.extra_info.update(
        device=str(device), threads=torch.get_num_threads(), precision=precision, dim=_DIM,
        bags=bags, instances=instances, seconds=medians, times_packed=ratios, **speed,
    )  # fmt: skip
    print(
        f"\n{bags} bags of mean {mean:,}, {precision}, {torch.get_num_threads()} thread(s) of "
        f"{device.type}: {speed['instances_per_s']:,.0f} instances/s, {speed['bags_per_s']:,.1f} "
        "bags/s; " + ", ".join(f"{form} {ratios[form]:.1f} times" for form in _FORMS[1:])
    )


def test_instances_left_out(benchmark: BenchmarkFixture) -> None:
    """A step of preset `best` on 8 bags of 5,000, beside one that leaves no instance out."""
    device = pick_device("auto")
    torch.manual_seed(0)
    model = HMIL(_DIM, _TREE.num_classes, readout=PRESETS["best"].readout).to(device)
    loss = HmilLoss(_TREE, "best", [1] * len(_TREE.leaves)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    bags = torch.stack([torch.arange(8) * 5_000, torch.full((8,), 5_000)], 1)
    x = torch.randn(40_000, _DIM, device=device)
    targets = torch.from_numpy(_TREE.ancestors()).T[torch.arange(8) % 7].to(device)
    shares = {"best": PRESETS["best"].instance_dropout, "all": 0.0}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in shares}

    def step(name: str) -> None:
        start = clock()
        own, left = drop_instances(x, bags, shares[name])
        own = drop_features(own, PRESETS["best"].feature_dropout)
        optimizer.zero_grad(set_to_none=True)
        loss(model(own, left), left, targets, 0, 10).total.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name].append(clock() - start)

    benchmark.pedantic(step, ("best",), setup=lambda: step("all"), rounds=7, warmup_rounds=1)
    gain = median(seconds["all"]) / median(seconds["best"])
    benchmark.extra_info.update(device=str(device), seconds=seconds, gain=gain)
    print(f"\n{shares['best']:.0%} of the instances left out: {gain:.2f} times the rate")


@pytest.mark.parametrize("tier", ["host", "map", "stream"])
def test_wait_for_data(benchmark: BenchmarkFixture, tmp_path: Path, tier: str) -> None:
    """The share of an epoch that a step waits for its features, shuffled, 8 bags a step."""
    device = pick_device("auto")
    cache = make_cache(tmp_path, 24, 1_000, tier, device)
    model = HMIL(_DIM, _TREE.num_classes).to(device)
    loss = HmilLoss(_TREE, "released").to(device)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    order = np.random.default_rng(1).permutation(24).reshape(3, 8).tolist()
    targets = torch.from_numpy(_TREE.ancestors()).T[torch.arange(8) % 7].to(device)
    shares: list[float] = []

    def epoch() -> None:
        waited, begun = 0.0, time.perf_counter()
        features = cache.batches(order, device)
        for _ in order:
            start = time.perf_counter()
            x, bags = next(features)
            waited += time.perf_counter() - start
            with amp(device):
                output = model(x, bags)
            optimizer.zero_grad(set_to_none=True)
            loss(output, bags, targets, 50, 200).total.backward()
            optimizer.step()
        shares.append(waited / (time.perf_counter() - begun))

    benchmark.pedantic(epoch, warmup_rounds=1, rounds=3)
    share = median(shares[1:])
    benchmark.extra_info.update(device=str(device), tier=tier, share=share)
    print(f"\n{tier}: waited for data {share:.2%} of the time")
