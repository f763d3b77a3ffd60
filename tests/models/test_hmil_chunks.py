"""HMIL and its loss on one bag in chunks, and over real gloo processes, against the whole bag."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from hmil_fast.labels import LabelTree
from hmil_fast.losses import HmilLoss
from hmil_fast.models.hmil import HMIL
from hmil_fast.models.output import HmilOutput

TREE = LabelTree.from_nested({"a": ["b", "c", "d"], "e": ["f", "g"], "h": ["i", "j"]})
ROWS, DIM = 200, 20
SHARDS = [[120, 1], [], [0, 15, 64]]  # chunks per rank


def _model(dropout: float = 0.0) -> HMIL:
    torch.manual_seed(0)
    model = HMIL(DIM, TREE.num_classes, hidden=12, dropout=dropout, readout="evidence").double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _features() -> Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _step(model: HMIL, output: HmilOutput, preset: str = "paper") -> dict[str, Tensor]:
    """The output, every term of the loss, and every parameter's gradient."""
    rows = len(output.attention_logits[0])
    targets = torch.from_numpy(TREE.ancestors()).T[4:5]
    loss = HmilLoss(TREE, preset)
    terms = loss(output, torch.tensor([[0, rows]]), targets, 50, 200, gather=False)
    model.zero_grad()
    terms.total.backward()
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    for field in ("logits", "attention_logits", "lse"):
        found |= {f"{field} {l}": t.detach() for l, t in enumerate(getattr(output, field))}
    return (
        found
        | {"embeddings": output.embeddings.detach(), "total": terms.total.detach()}
        | terms.terms
    )


def _assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, truth in theirs.items():
        torch.testing.assert_close(
            ours[name], truth, rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("sizes", [[200], [199, 1], [0, 120, 1, 79], [7] * 28 + [4]], ids=str)
def test_chunks_train_as_the_whole_bag(sizes: list[int], preset: str) -> None:
    model, x = _model(), _features()
    whole = _step(model, model(x, torch.tensor([[0, ROWS]])), preset)
    assert {"fine", "coarse", "hba", "ham", "supcon"} <= whole.keys()
    ours = _step(model, model.forward_chunks(torch.split(x, sizes)), preset)
    _assert_equal(ours, whole)


def test_half_precision_and_autocast() -> None:
    model, x = _model().float(), _features().half()
    bags = torch.tensor([[0, ROWS]])
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            whole, ours = model(x, bags), model.forward_chunks(torch.split(x, 64))
        whole_step, step = _step(model, whole), _step(model, ours)
        for name, truth in whole_step.items():
            assert step[name].dtype == torch.float32
            error = (step[name] - truth).norm() / truth.norm().clamp_min(1e-2)
            assert error < (3e-2 if enabled else 1e-4), name


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_bag_of_nothing(count: int) -> None:
    model, x = _model(), _features()
    whole = model(x, torch.tensor([[0, 0]]))
    ours = model.forward_chunks([x[:0]] * count)
    for a, b in zip(
        (*ours.logits, *ours.lse, ours.embeddings),
        (*whole.logits, *whole.lse, whole.embeddings),
        strict=True,
    ):
        assert torch.equal(a, b)
    step = _step(model, ours)
    assert all(t.isfinite().all() for name, t in step.items() if not name.startswith("lse"))


def test_dropout_trains_and_does_not_predict() -> None:
    model, chunks = _model(dropout=0.5), torch.split(_features(), 50)
    first, second = (model.forward_chunks(chunks).logits[1] for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    with torch.no_grad():
        first, second = (model.forward_chunks(chunks).logits[1] for _ in range(2))
        assert torch.equal(first, second)
        whole = model(_features(), torch.tensor([[0, ROWS]])).logits[1]
    torch.testing.assert_close(first, whole)


def test_a_chunk_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[5, 19\]; give \[N, 20\]"):
        _model().forward_chunks([torch.zeros(5, 19)])


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=len(SHARDS))
    model, sizes = _model(), [size for shard in SHARDS for size in shard]
    before = sum(len(shard) for shard in SHARDS[:rank])
    own = torch.split(_features(), sizes)[before : before + len(SHARDS[rank])]
    for preset in ("paper", "released"):
        found = _step(model, model.forward_chunks(own, sharded=True), preset)
        torch.save(found, f"{folder}/{preset}-{rank}.pt")
    distributed.barrier()
    os._exit(0)  # torch's threads have been seen to abort an ordinary exit


@pytest.mark.slow
def test_a_bag_on_three_ranks_trains_as_on_one(tmp_path: Path) -> None:
    multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=len(SHARDS))
    model = _model()
    for preset in ("paper", "released"):
        whole = _step(model, model(_features(), torch.tensor([[0, ROWS]])), preset)
        ranks = [
            torch.load(tmp_path / f"{preset}-{k}.pt", weights_only=True) for k in range(len(SHARDS))
        ]
        for name in whole:
            if not name.startswith("gradient"):
                assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks), name
        means = {name: torch.stack([rank[name] for rank in ranks]).mean(0) for name in whole}
        _assert_equal(means, whole)
        # the empty rank has a share of its own: of what lies behind the pooling
        assert ranks[1]["gradient of reduce.weight"].abs().max() == 0
        assert ranks[1]["gradient of levels.0.classify.weight"].abs().max() > 0
