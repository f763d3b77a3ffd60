"""The memory of SupCon: a queue per leaf, in the loss, over a resume, and across real ranks."""

import math
import os
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing

from hmil_fast.labels import LabelTree
from hmil_fast.losses import PRESETS, HmilLoss
from hmil_fast.losses.memory import Memory

SETTINGS = replace(
    PRESETS["paper"], curriculum="constant", supcon="levels", tau=0.3, supcon_memory=2
)
STEPS = [[0, 1, 2, 2, 1, 4], [3, 1, 1, 0], [4], [2, 3, 3, 1, 0, 0]]


def test_queues_equal_deques() -> None:
    generator = torch.Generator().manual_seed(0)
    memory, queues = Memory(4, 3), [deque[Tensor](maxlen=3) for _ in range(4)]
    for size in (0, 1, 5, 20, 2, 0, 9):
        rows = torch.randn(size, 6, generator=generator)
        leaf = torch.randint(0, 3, (size,), generator=generator)  # leaf 3 never comes
        memory.recall(rows)
        shuffled = torch.randperm(size, generator=generator)  # as processes may share a step
        memory.remember(rows[shuffled], leaf[shuffled])
        for k, queue in enumerate(queues):
            new = sorted(rows[leaf == k], key=lambda row: row[0])
            n = len(new)
            queue.extend(new if n <= 3 else [new[n // 6], new[n // 2], new[5 * n // 6]])
        past = memory.recall(rows)
        assert past.rows.shape == (12, 6)
        assert past.leaf.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        for k, queue in enumerate(queues):
            held = past.rows[(past.leaf == k) & past.filled]
            assert sorted(held.tolist()) == sorted(row.tolist() for row in queue)
    assert memory.count.sum() == 37
    assert not past.filled[-3:].any()


def test_what_stays_of_a_frequent_leaf_is_like_all_of_it() -> None:
    rows = torch.randn(40, 56, 6, generator=torch.Generator().manual_seed(0))
    memory, held = Memory(1, 8), []
    for step in rows:
        memory.recall(step)
        memory.remember(step, torch.zeros(56, dtype=torch.int64))
        held.append(memory.recall(step).rows)
    assert (torch.cat(held).mean(0) - rows.mean((0, 1))).abs().max() < 0.2


def _expected(z: Tensor, leaf: list[int], past: list[tuple[Tensor, int]], tree: LabelTree) -> float:
    """The batch's rows as anchors against each other and the past, over levels, in plain Python."""
    rows = [*z, *(row for row, _ in past)]
    leaves = leaf + [k for _, k in past]
    losses = []
    for nodes in tree.ancestors().tolist():
        anchors = []
        for i in range(len(z)):
            s = [float(row @ z[i]) / 0.3 for row in rows]
            log_sum = math.log(sum(math.exp(v) for a, v in enumerate(s) if a != i))
            log_p = [
                v - log_sum
                for a, v in enumerate(s)
                if a != i and nodes[leaves[a]] == nodes[leaves[i]]
            ]
            if log_p:
                anchors.append(-sum(log_p) / len(log_p))
        losses.append(sum(anchors) / len(anchors))
    weights = [math.exp(1 / 3), math.exp(1 / 2), math.e]
    return sum(w * v for w, v in zip(weights, losses, strict=True)) / sum(weights)


def test_later_steps_see_the_latest_slides_of_each_leaf(uneven: LabelTree, batch: Any) -> None:
    loss = HmilLoss(uneven, SETTINGS)
    queues = [deque[Tensor](maxlen=2) for _ in range(5)]
    for seed, leaves in enumerate(STEPS):
        output, bags, targets = batch(leaves, seed)
        z = output.embeddings.detach()
        terms = loss(output, bags, targets, 0, 1)
        past = [(row, k) for k, queue in enumerate(queues) for row in queue]
        rows_of = [k for k in leaves for _ in range(5)]
        expected = _expected(z.flatten(0, 1), rows_of, past, uneven)
        assert terms.terms["supcon"].item() == pytest.approx(expected, rel=1e-10)
        terms.total.backward()
        for bag, k in enumerate(leaves):
            queues[k].append(z[bag, k])
    assert not any(buffer.requires_grad for buffer in loss.buffers())


def test_gradient_with_a_memory(uneven: LabelTree, batch: Any) -> None:
    loss = HmilLoss(uneven, SETTINGS)
    first, second = batch(STEPS[0]), batch(STEPS[1], 1)
    loss(*first, 0, 1)
    loss.eval()  # remembers nothing: every call below sees the same past

    def value(z: Tensor) -> Tensor:
        output = second.output._replace(embeddings=z)
        return loss(output, second.bags, second.targets, 0, 1).total

    assert torch.autograd.gradcheck(value, second.output.embeddings)
    assert value(second.output.embeddings) == value(second.output.embeddings)


def test_an_empty_memory_changes_nothing(uneven: LabelTree, batch: Any) -> None:
    drawn = batch(STEPS[0])
    plain = HmilLoss(uneven, replace(SETTINGS, supcon_memory=0))(*drawn, 0, 1)
    ours = HmilLoss(uneven, SETTINGS)(*drawn, 0, 1)
    torch.testing.assert_close(ours.total, plain.total)
    rows = [
        torch.autograd.grad(terms.total, drawn.output.embeddings, retain_graph=True)[0]
        for terms in (ours, plain)
    ]
    torch.testing.assert_close(*rows)


def test_autocast_keeps_the_past_in_float32(uneven: LabelTree, batch: Any) -> None:
    values = []
    for enabled in (False, True):
        loss = HmilLoss(uneven, SETTINGS)
        for seed in range(2):
            output, bags, targets = batch(STEPS[seed], seed)
            output = output._replace(embeddings=output.embeddings.detach().float())
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                values.append(loss(output, bags, targets, 0, 1).terms["supcon"])
    assert torch.equal(torch.stack(values[:2]), torch.stack(values[2:]))


@pytest.mark.parametrize("steps", [0, 3])
def test_a_resumed_loss_goes_on_bit_for_bit(
    steps: int, uneven: LabelTree, batch: Any, tmp_path: Path
) -> None:
    ours = HmilLoss(uneven, SETTINGS)
    for seed in range(steps):
        ours(*batch(STEPS[seed], seed), 0, 1)
    save_file(ours.state_dict(), tmp_path / "loss.safetensors")
    assert sum(t.numel() for t in ours.state_dict().values()) == (5 if not steps else 5 + 5 * 2 * 6)
    resumed = HmilLoss(uneven, SETTINGS)
    resumed.load_state_dict(load_file(tmp_path / "loss.safetensors"))
    for seed, leaves in enumerate(STEPS):
        a, b = (loss(*batch(leaves, seed + 9), 0, 1).total for loss in (ours, resumed))
        assert torch.equal(a, b)
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_the_past_of_another_tree_is_refused(uneven: LabelTree, batch: Any) -> None:
    ours = HmilLoss(uneven, SETTINGS)
    ours(*batch(STEPS[0]), 0, 1)
    other = HmilLoss(uneven, replace(SETTINGS, supcon_memory=3))
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(ours.state_dict())


def test_one_row_a_leaf_is_asked_for(uneven: LabelTree, batch: Any) -> None:
    output, bags, targets = batch(STEPS[0])
    output = output._replace(embeddings=output.embeddings[:, :3])
    with pytest.raises(ValueError, match="has 3 rows a bag, the tree 5 leaves"):
        HmilLoss(uneven, SETTINGS)(output, bags, targets, 0, 1)


def _rank(rank: int, inputs: tuple[LabelTree, list[Any]], folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    tree, steps = inputs
    loss, found = HmilLoss(tree, SETTINGS), {}
    for step, (output, targets) in enumerate(steps):
        own = slice(0, 1) if rank == 0 else slice(1, None)
        z = output[own].clone().requires_grad_()
        flat = tuple(z.new_zeros(len(z), k) for k in tree.num_classes)
        bags = torch.zeros(len(z), 2, dtype=torch.int64)
        seen = SimpleNamespace(logits=flat, attention_logits=(), lse=(), embeddings=z)
        terms = loss(seen, bags, targets[own], 0, 1)
        found[f"{step} value"] = terms.terms["supcon"]
        found[f"{step} grad"] = torch.autograd.grad(terms.total, z)[0]
    found.update(loss.state_dict())
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()
    os._exit(0)  # torch's threads have been seen to abort an ordinary exit


@pytest.mark.slow
def test_ranks_share_one_past(uneven: LabelTree, batch: Any, tmp_path: Path) -> None:
    drawn = [batch(leaves, seed) for seed, leaves in enumerate(STEPS[:2])]
    steps = [(d.output.embeddings.detach(), d.targets) for d in drawn]
    multiprocessing.spawn(_rank, ((uneven, steps), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    alone = HmilLoss(uneven, SETTINGS)
    for step, d in enumerate(drawn):
        terms = alone(*d, 0, 1)
        grad = 2 * torch.autograd.grad(terms.total, d.output.embeddings)[0]  # summed over ranks
        ours = torch.cat([found[f"{step} grad"] for found in ranks])
        torch.testing.assert_close(ours, grad, rtol=1e-10, atol=1e-12)
        for found in ranks:
            torch.testing.assert_close(found[f"{step} value"], terms.terms["supcon"])
    for name, held in alone.state_dict().items():
        assert all(torch.equal(found[name], held) for found in ranks)
